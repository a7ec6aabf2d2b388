"""The export of a checkpoint as a Hugging Face model directory: config.json, safetensors, tokenizer, and code for transformers. Adapters
are added to the weights, or are exported alone in the format of PEFT."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from w1train.checkpoints.manifest import read_progress
from w1train.checkpoints.stored_size import require_stored
from w1train.checkpoints.verification import read_config
from w1train.config.errors import UserError, listing
from w1train.config.phases import stage_of_step
from w1train.config.schema import Config
from w1train.config.stages import at_stage
from w1train.conversion.exported_tokenizer import COMPANIONS, write_tokenizer
from w1train.conversion.families import CONFIG_FILE, FAMILIES, STOCK, W1, W1_FAMILY, config_of, family_problems, stock_family
from w1train.conversion.filling import StoredModel, require_fit
from w1train.conversion.merging import MergedSource
from w1train.conversion.output_meaning import meaning_of_outputs, require_timesteps_of_masks
from w1train.conversion.peft_files import ADAPTER_FILES, write_adapters
from w1train.conversion.pieces import stored_pieces
from w1train.conversion.sources import INDEX_FILE, CheckpointDirectory, TensorSource
from w1train.conversion.tensors import EXPERT_BIAS, Parameter, checkpoint_parameters, hugging_face_parameters
from w1train.conversion.writing import Entry, write_safetensors
from w1train.model.flops import NO_ADAPTERS
from w1train.runtime.files import PARTIAL_SUFFIX, write_text
from w1train.runtime.output_files import require_apart
from w1train.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_REMOTE_CODE = ("configuration_w1.py", "modeling_w1.py")
_OTHER_FILES = (CONFIG_FILE, INDEX_FILE, "tokenizer.json", *COMPANIONS, *_REMOTE_CODE, *ADAPTER_FILES)
_FILE = re.compile(rf"(?:model(?:-\d+-of-\d+)?\.safetensors|{'|'.join(map(re.escape, _OTHER_FILES))})(?:{re.escape(PARTIAL_SUFFIX)})?")
"""The names of an export's files, finished or not."""


ExportedPart = Literal["merged", "base", "adapters"]
"""merged: the model, with its adapters added to the weights if it has adapters. base: the model without its adapters. adapters: these
alone."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The files and the size of an export."""

    model_type: str
    files: tuple[str, ...]
    num_parameters: int


def export(
    run: RunDirectory, checkpoint: Path, output: Path, model_format: str, max_shard_bytes: int, part: ExportedPart = "merged"
) -> Exported:
    """Write the directory ``output`` completely or not at all. One tensor of the model is in memory at a time.

    Args:
        checkpoint: a checkpoint of the run, which the caller has verified.
        model_format: "w1", "stock" or a name in FAMILIES.

    Raises:
        UserError: ``output`` is not empty, is a mount point or is among the run's checkpoints, the directory in which it is prepared has
            other files, the requested stock class cannot compute this model, the checkpoint's tensors are not those of the
            configuration, or the adapters alone are asked for and are not all that the run has trained.
        CheckpointError: the checkpoint's index cannot be read.
        OSError: ``output`` cannot be written.
    """
    config = read_config(checkpoint)
    config = at_stage(config, stage_of_step(config, read_progress(checkpoint).step))
    require_stored(checkpoint, config.model)
    source = CheckpointDirectory(checkpoint)
    stored = tuple(checkpoint_parameters(config.model, config.adapters))
    require_fit(StoredModel(str(checkpoint), config.model, source, stored), config.model)
    _one_dtype(checkpoint, source)
    model_type = stock_family(config.model) if model_format == STOCK else model_format
    _require_computed(config, model_type)
    if part == "base" and config.adapters.train:
        raise UserError(
            f"adapters.train is {listing(config.adapters.train)}: this run has trained a part of its base; export it without --base"
        )
    output, partial = _places(output)
    require_apart([output, partial], [run.checkpoints])
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    parameters = list(hugging_face_parameters(config.model, (W1_FAMILY if model_type == W1 else FAMILIES[model_type]).names))
    if part == "adapters":
        num_parameters = write_adapters(partial, config, source, parameters, is_causal=model_type != W1 and FAMILIES[model_type].is_causal)
    else:
        adapters = config.adapters if part == "merged" else NO_ADAPTERS
        entries = list(_entries(source, parameters))
        write_safetensors(partial, entries, _tensors(MergedSource(source, adapters), parameters), max_shard_bytes)
        _describe(run, config, model_type, _one_dtype(checkpoint, source), partial)
        num_parameters = sum(math.prod(entry.shape) for entry in entries if not entry.name.endswith(EXPERT_BIAS))
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return Exported(model_type, tuple(sorted(path.name for path in output.iterdir())), num_parameters)


def _describe(run: RunDirectory, config: Config, model_type: str, dtype: torch.dtype, directory: Path) -> None:
    """Write the files beside the weights: the tokenizer, config.json, and the code of w1's own format."""
    special = write_tokenizer(run.tokenizer, Path(config.data.tokenizer), directory, config.model.vocab_size) | meaning_of_outputs(config)
    if model_type == W1:
        special |= {"mask_token_id": config.diffusion.mask_token_id, "exclude_mask_logit": config.diffusion.exclude_mask_logit}
        for name in _REMOTE_CODE:
            write_text(directory / name, files("w1train.conversion.remote_code").joinpath(name).read_text(encoding="utf-8"))
    else:
        if not FAMILIES[model_type].is_causal:
            special |= {"mask_token_id": config.diffusion.mask_token_id}
        _warn_of_use(model_type, special)
    hugging_face = config_of(config.model, model_type, str(dtype).removeprefix("torch."), special)
    write_text(directory / CONFIG_FILE, json.dumps(hugging_face, indent=2) + "\n")


def _require_computed(config: Config, model_type: str) -> None:
    """Refuse a model that the exported class would not compute.

    Raises:
        UserError: as its message says.
    """
    if model_type != W1 and (problems := family_problems(config.model, model_type)):
        raise UserError(f"this model is not a {model_type} model: {listing(problems)}; export it with --format {W1}")
    if model_type == W1:
        require_timesteps_of_masks(config)
        pool = config.model.experts.pool_per_block if config.model.experts.num_experts else 0
        if pool:
            raise UserError(f"model.experts.pool_per_block is {pool}, and the exported code computes only models with 0")


def _warn_of_use(model_type: str, special: Mapping[str, Any]) -> None:
    """Warn of what the class of a family does not do as this model was trained, or needs besides the export."""
    family = FAMILIES[model_type]
    if family.is_causal and special["prediction"] != "next_token":
        logger.warning(
            "the stock class of %s attends causally and takes each output as the next token's. This model's outputs are its own token's "
            "unless config.json says shift, and see more: use this export only for its weights",
            model_type,
        )
    if not family.is_causal and special["shift"]:
        logger.warning("the class of %s takes each output as its own token's, and this model's outputs are the next token's", model_type)
    if not family.is_causal:
        logger.info("for transformers, copy the files that auto_map in config.json names from a published model of %s", family.architecture)


def _places(output: Path) -> tuple[Path, Path]:
    """Return the directory that ``output`` leads to, and the directory beside it in which an export is prepared.

    Raises:
        UserError: one of them has other files, or the first cannot be replaced. The second may have the files of an interrupted export.
    """
    place = Path(os.path.realpath(output))  # the name "." has no neighbour, and a link to a directory cannot be removed as one
    if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{output} is there already and not empty: remove it, or choose another place")
    if os.path.ismount(place):
        raise UserError(f"{output} is a mount point, which cannot be replaced: choose a new directory in it, such as {output / 'model'}")
    partial = place.with_name(place.name + PARTIAL_SUFFIX)
    if os.path.lexists(partial) and not _is_interrupted_export(partial):
        raise UserError(f"{partial}, where the export would be prepared, has other files: remove it, or choose another place")
    return place, partial


def _is_interrupted_export(directory: Path) -> bool:
    if directory.is_symlink() or not directory.is_dir():
        return False
    return all(_FILE.fullmatch(path.name) and path.is_file() and not path.is_symlink() for path in directory.iterdir())


def _one_dtype(checkpoint: Path, source: CheckpointDirectory) -> torch.dtype:
    """Return the dtype of the weights. config.json can name only one dtype, so weights of several dtypes raise UserError. The numbers that
    balance experts are float32 in every file: rounded, they would choose other experts."""
    names = {dtype: name for name, dtype in source.dtypes.items() if not name.endswith(EXPERT_BIAS)}
    if len(names) > 1:
        found = listing(f"{name} is {dtype}" for dtype, name in names.items())
        raise UserError(f"the weights of {checkpoint} are of several types ({found}); weights of one type can be exported")
    return next(iter(names))


def _entries(source: CheckpointDirectory, parameters: Sequence[Parameter]) -> Iterator[Entry]:
    for parameter in parameters:
        for name, parts in groupby(parameter.parts, key=lambda part: part.tensor):
            yield Entry(name, (sum(part.num_rows for part in parts), *parameter.shape[1:]), source.dtypes[parameter.name])


def _tensors(source: TensorSource, parameters: Sequence[Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of each parameter: the inverse of w1train.conversion.filling."""
    for parameter in parameters:
        yield from stored_pieces(parameter, source.read(parameter.name, tuple(slice(0, extent) for extent in parameter.shape)))

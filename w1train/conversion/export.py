"""The export of a checkpoint as a Hugging Face model directory: config.json, safetensors, tokenizer, and code for transformers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w1train.checkpoints.manifest import read_progress
from w1train.checkpoints.stored_size import require_stored
from w1train.checkpoints.verification import read_config
from w1train.config.errors import UserError, listing
from w1train.config.phases import stage_of_step
from w1train.config.reading import LARGEST_JSON, parse_json_object
from w1train.config.stages import at_stage
from w1train.conversion.families import CONFIG_FILE, STOCK, W1, config_of, family_problems, stock_family
from w1train.conversion.filling import StoredModel, require_fit
from w1train.conversion.output_meaning import meaning_of_outputs
from w1train.conversion.sources import CheckpointDirectory, find_inside
from w1train.conversion.tensors import Parameter, checkpoint_parameters, hugging_face_parameters
from w1train.conversion.writing import Entry, write_safetensors
from w1train.data.tokenizers.tokenizer import BOS_TOKEN, EOS_TOKEN, MASK_TOKEN, PAD_TOKEN, Tokenizer
from w1train.runtime.files import PARTIAL_SUFFIX, write_bytes, write_text
from w1train.runtime.names import is_plain_name, open_inside
from w1train.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_REMOTE_CODE = ("configuration_w1.py", "modeling_w1.py")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Exported:
    """The files and the size of an export."""

    model_type: str
    files: tuple[str, ...]
    num_parameters: int


def export(run: RunDirectory, checkpoint: Path, output: Path, model_format: str, max_shard_bytes: int) -> Exported:
    """Write the directory ``output`` completely or not at all. One tensor of the model is in memory at a time.

    Args:
        checkpoint: a checkpoint of the run, which the caller has verified.
        model_format: "w1", "stock" or a name in FAMILIES.

    Raises:
        UserError: ``output`` is not empty, the requested stock class cannot compute this model, or the checkpoint's tensors are not those
            of its configuration.
        CheckpointError: the checkpoint's index cannot be read.
        OSError: ``output`` cannot be written.
    """
    config = read_config(checkpoint)
    config = at_stage(config, stage_of_step(config, read_progress(checkpoint).step))
    require_stored(checkpoint, config.model)
    source = CheckpointDirectory(checkpoint)
    require_fit(StoredModel(str(checkpoint), config.model, source, tuple(checkpoint_parameters(config.model))), config.model)
    dtype = _one_dtype(checkpoint, source)
    model_type = stock_family(config.model) if model_format == STOCK else model_format
    if model_type != W1 and (problems := family_problems(config.model, model_type)):
        raise UserError(f"this model is not a {model_type} model: {listing(problems)}; export it with --format {W1}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already and not empty: remove it, or choose another place")
    partial = output.with_name(output.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    parameters = list(hugging_face_parameters(config.model))
    entries = list(_entries(source, parameters))
    write_safetensors(partial, entries, _tensors(source, parameters), max_shard_bytes)
    special = _tokenizer_files(run.tokenizer, Path(config.data.tokenizer), partial) | meaning_of_outputs(config)
    if model_type == W1:
        special |= {"mask_token_id": config.diffusion.mask_token_id, "exclude_mask_logit": config.diffusion.exclude_mask_logit}
        for name in _REMOTE_CODE:
            write_text(partial / name, files("w1train.conversion.remote_code").joinpath(name).read_text(encoding="utf-8"))
    hugging_face = config_of(config.model, model_type, str(dtype).removeprefix("torch."), special)
    write_text(partial / CONFIG_FILE, json.dumps(hugging_face, indent=2) + "\n")
    if output.exists():
        output.rmdir()
    partial.rename(output)
    if model_type != W1 and special["process"] != "autoregressive":
        logger.warning(
            "the stock class of %s attends causally and takes each output as the next token's. This model's outputs are its own token's "
            "unless config.json says shift, and see more: use this export only for its weights",
            model_type,
        )
    names = tuple(sorted(path.name for path in output.iterdir()))
    return Exported(model_type, names, sum(entry.num_bytes for entry in entries) // dtype.itemsize)


def _one_dtype(checkpoint: Path, source: CheckpointDirectory) -> torch.dtype:
    """Return the dtype of the weights. config.json can name only one dtype, so weights of several dtypes raise UserError."""
    names = {dtype: name for name, dtype in source.dtypes.items()}
    if len(names) > 1:
        found = listing(f"{name} is {dtype}" for dtype, name in names.items())
        raise UserError(f"the weights of {checkpoint} are of several types ({found}); weights of one type can be exported")
    return next(iter(names))


def _entries(source: CheckpointDirectory, parameters: Sequence[Parameter]) -> Iterator[Entry]:
    for parameter in parameters:
        for part in parameter.parts:
            yield Entry(part.tensor, (part.num_rows, *parameter.shape[1:]), source.dtypes[parameter.name])


def _tensors(source: CheckpointDirectory, parameters: Sequence[Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parts of each parameter: the inverse of w1train.conversion.filling."""
    for parameter in parameters:
        whole = source.read(parameter.name, tuple(slice(0, extent) for extent in parameter.shape))
        rows = whole.view(parameter.num_groups, -1, *parameter.shape[1:])
        sizes = [part.num_rows // parameter.num_groups for part in parameter.parts]
        for part, piece in zip(parameter.parts, torch.split(rows, sizes, dim=1), strict=True):
            yield part.tensor, piece.reshape(part.num_rows, *parameter.shape[1:])


def _copy_companion(directory: Path, name: str, output: Path) -> None:
    """Copy a file from the directory of a tokenizer, if the file exists, without its auto_map.

    An auto_map names code, even of other repositories, which transformers would run for users who trust this export's own code.
    The directory's name comes from a config.yaml that somebody else may have written, and exports are published: a file that is too large,
    or a link to a file in another directory, is left out with a warning.
    """
    path = directory / name
    try:
        with _open_companion(directory, name) as file:
            content = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning(
            "%s is left out of the export: it is a link to a file elsewhere, or cannot be read (%s)", path, error.strerror or error
        )
        return
    if len(content) > LARGEST_JSON:
        logger.warning("%s is left out of the export: it has more than %d bytes", path, LARGEST_JSON)
        return
    if path.suffix == ".json":
        settings = parse_json_object(content, f"{path} has no settings of a tokenizer")
        if settings.pop("auto_map", None) is not None:
            logger.warning("%s: its auto_map, which names code to run, is left out of the export", path)
            content = (json.dumps(settings, indent=2) + "\n").encode("utf-8")
    write_bytes(output / name, content)


def _open_companion(directory: Path, name: str) -> BufferedReader:
    """Open a regular file of a directory. Links of the cache of huggingface_hub are followed, as for weights (w1train.conversion.sources).

    Raises:
        OSError: the file does not exist, cannot be read, is another link or is not a regular file.
    """
    if (target := find_inside(directory, name)) is not None and is_plain_name(target.name):
        return open_inside(target.parent, target.name)
    return open_inside(directory, name)


def _tokenizer_files(copy: Path, original: Path, output: Path) -> dict[str, Any]:
    """Write the tokenizer and the settings that transformers keeps with it, and return the ids of its special tokens for config.json.

    Args:
        copy: the run's own copy of the tokenizer, because the original may be on another machine.
        original: the file that the run's configuration names; settings in its directory are copied.
    """
    path = next((path for path in (copy, original) if path.is_file()), None)
    if path is None:
        logger.warning("the run's tokenizer is neither %s nor %s: the export has no tokenizer", copy, original)
        return {}
    tokenizer = Tokenizer.load(path)
    tokenizer.save(output / "tokenizer.json")
    if not original.parent.is_dir():
        logger.warning("%s does not exist: the export gets default settings of the tokenizer", original.parent)
    for name in _COMPANIONS:
        _copy_companion(original.parent, name, output)
    if not (output / "tokenizer_config.json").is_file():
        tokens = {"eos_token": EOS_TOKEN, "bos_token": BOS_TOKEN, "pad_token": PAD_TOKEN, "mask_token": MASK_TOKEN}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
        write_text(output / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}

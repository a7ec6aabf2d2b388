"""The check of the tokenizer and of the datasets, by their manifests. Tokens and indices are not read: they may have terabytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from w1train.config.errors import Problem, UserError, show
from w1train.config.schedule import stage_steps
from w1train.config.schema import Config
from w1train.config.stages import batch_sizes
from w1train.data.conversations.chat_prompts import chat_prompts_of
from w1train.data.dataset import DatasetError, check_fits, read_manifest
from w1train.data.dataset_manifest import DatasetManifest
from w1train.data.remote import is_remote, require_password
from w1train.data.sharded_dataset import part_names
from w1train.data.tokenizer import Tokenizer, TokenizerError, read_tokenizer_file
from w1train.preflight.next_command import absolute, make_dataset, make_tokenizer
from w1train.runtime.object_storage import require_protocol


def files_rule(config: Config) -> Iterator[Problem]:
    """Check the tokenizer, the mask token, and every dataset that the run reads."""
    tokenizer = None
    try:
        path = absolute(config.data.tokenizer)
        tokenizer = Tokenizer(read_tokenizer_file(Path(path)), origin=path)
    except TokenizerError as error:
        yield Problem("data.tokenizer", str(error), "a tokenizer.json with <pad>, <eos> and <mask>", make_tokenizer(config))
    else:
        yield from _mask_problems(config, tokenizer)
        yield from _prompt_problems(config, tokenizer)
    train, validation = training_datasets(config), validation_datasets(config)
    trained: dict[str, str] = {}
    for key, prefix in (train | validation).items():
        if is_remote(prefix):
            yield from _remote_problems(key, prefix)
            continue
        try:
            parts = _manifests(config, prefix, tokenizer)
        except (DatasetError, OSError) as error:
            yield Problem(key, str(error), "the prefix of a tokenized dataset that fits the run", _next_command(config, key))
            continue
        if key in train:
            yield from _length_problems(config, key, parts)
            trained |= {part.bin_sha256: key for part in parts}
        elif twins := [trained[part.bin_sha256] for part in parts if part.bin_sha256 in trained]:
            yield Problem(key, f"{absolute(prefix)}: the same tokens as {twins[0]}, by their hash", "a dataset that no stage trains on")


def counts_rule(config: Config) -> Iterator[Problem]:
    """Check that the counts of tokens are there, if the noise of a stage depends on them."""
    counts = config.diffusion.token_counts
    if config.diffusion.objective == "per_id_masked" and counts is not None and not os.path.exists(counts):
        prefix = next(iter(training_datasets(config).values()), "PREFIX")
        command = f"w1train data count-tokens {absolute(prefix)} --vocab-size {config.model.vocab_size} --output {absolute(counts)}"
        yield Problem("diffusion.token_counts", f"{absolute(counts)}: no such file", "a file with the count of each token id", command)


def training_datasets(config: Config) -> dict[str, str]:
    """Return the prefixes of the datasets that a stage with a step reads, by their keys."""
    data, found = config.data, {}
    for name in _stages_with_steps(config):
        stage = config.schedule.stages[name]
        if stage.train is not None:
            found[f"schedule.stages.{name}.train"] = stage.train
        elif data.blend:
            weights = stage.blend or {corpus: data.blend[corpus].weight for corpus in data.blend}
            used = [corpus for corpus, weight in weights.items() if weight > 0 and corpus in data.blend]
            found |= {f"data.blend.{corpus}.prefix": data.blend[corpus].prefix for corpus in used}
        elif data.train is not None:
            found["data.train"] = data.train
    return found


def validation_datasets(config: Config) -> dict[str, str]:
    """Return the prefixes of the validation datasets by their keys."""
    data = config.data
    if data.validation is None:
        return {}
    return {"data.validation": data.validation} | {f"data.validation_sets.{name}": prefix for name, prefix in data.validation_sets.items()}


def _stages_with_steps(config: Config) -> list[str]:
    length = config.data.sequence_length
    if min(length, *batch_sizes(config).values()) < 1:  # another rule reports it
        return list(config.schedule.stages)
    steps = stage_steps(config.schedule, config.training.global_batch_size, length)
    return [name for name, (_, num_steps) in steps.items() if num_steps > 0]


def _mask_problems(config: Config, tokenizer: Tokenizer) -> Iterator[Problem]:
    mask, right = config.diffusion.mask_token_id, tokenizer.mask_token_id
    if mask != right:
        path = absolute(config.data.tokenizer)
        suggestion = f"diffusion.mask_token_id={right}, or a tokenizer that is trained with --mask-token-id {mask}"
        yield Problem("diffusion.mask_token_id", show(mask), f"{right}, the mask token of {path}", suggestion)


def _prompt_problems(config: Config, tokenizer: Tokenizer) -> Iterator[Problem]:
    """Check the chat template, and the prompts that it makes messages of. The run would end at its first samples otherwise."""
    sampling = config.sampling
    try:
        chat = chat_prompts_of(config, tokenizer)
    except UserError as error:
        valid = "a jinja file, a tokenizer_config.json, a directory of a Hugging Face model, or built_in"
        yield Problem("sampling.chat_template", str(error).removeprefix("sampling.chat_template: "), valid)
        return
    if chat is None or sampling.interval == 0:
        return
    try:
        longest = max(map(len, chat.encode(sampling.prompts)), default=0)
    except UserError as error:
        yield Problem("sampling.prompts", str(error), "prompts that the chat template takes")
        return
    limit = config.model.max_sequence_length
    if longest + sampling.num_tokens > limit:
        found = f"{longest} tokens of the longest prompt by the chat template, and sampling.num_tokens={sampling.num_tokens}"
        yield Problem("sampling.prompts", found, f"at most model.max_sequence_length ({limit}) together")


def _remote_problems(key: str, prefix: str) -> Iterator[Problem]:
    try:
        require_password(prefix)
        require_protocol(key, prefix)
    except UserError as error:
        yield Problem(key, str(error), "a URL that fsspec can open, or a local dataset")


def _manifests(config: Config, prefix: str, tokenizer: Tokenizer | None) -> list[DatasetManifest]:
    """Return the manifests of a dataset's parts, without those that other software did not write."""
    found = []
    for part in part_names(absolute(prefix)):
        manifest = read_manifest(part)
        if manifest is not None:
            check_fits(part, manifest, tokenizer, config.model.vocab_size)
            found.append(manifest)
    return found


def _length_problems(config: Config, key: str, parts: Sequence[DatasetManifest]) -> Iterator[Problem]:
    num_tokens, length = sum(part.num_tokens for part in parts), config.data.sequence_length
    if parts and num_tokens < length and config.data.packing != "separate":
        found = f"a dataset of {num_tokens} tokens"
        yield Problem(key, found, f"at least one sample of data.sequence_length ({length}) tokens", "more text, or shorter samples")


def _next_command(config: Config, key: str) -> str:
    """Return the command that makes a dataset. If the training and the validation dataset are missing, one command makes both."""
    data = config.data
    if key in ("data.train", "data.validation") and data.train is not None and data.validation is not None:
        is_any_there = _is_there(data.train) or _is_there(data.validation)
        if not is_any_there:
            return make_dataset(config, data.train, data.validation)
    prefix = (training_datasets(config) | validation_datasets(config))[key]
    return make_dataset(config, prefix, overwrite=_is_there(prefix))


def _is_there(prefix: str) -> bool:
    return any(os.path.exists(f"{part}.bin") for part in part_names(prefix))

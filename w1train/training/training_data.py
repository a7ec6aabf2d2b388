"""The run's data: tokenizer, training loader and validation set, checked before anything is allocated."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from w1train.config.errors import UserError
from w1train.config.schedule import stage_steps
from w1train.config.schema import Config
from w1train.config.stages import at_stage, has_preferences
from w1train.data.batch import PackedBatch
from w1train.data.dali import DaliLoader
from w1train.data.dataset import TokenDataset
from w1train.data.indexed import DatasetError, bin_path, file_size
from w1train.data.loader import BatchLoader, validation_batches, validation_token_counts
from w1train.data.packed.packing import EndOfDocument, Fill, LongDocuments, PackedDataset, SampleSource
from w1train.data.packed.packing_index import BestFitDataset, PackingIndex, PackingOptions, ensure_packing
from w1train.data.packed.separate import SeparateDataset
from w1train.data.packed.staged import StagedSamples, StageText, stretches
from w1train.data.remote import localize
from w1train.data.sharded_dataset import open_dataset
from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import unigram_bits
from w1train.runtime.distributed import Ranks
from w1train.runtime.run_directory import RunDirectory
from w1train.training.dataset_kinds import check_kinds, check_validation_kind, check_whole_conversations, kind_of

logger = logging.getLogger(__name__)

MAX_VERIFIED_BYTES = 4 * 2**30
"""The largest size of a token file or packing that a start reads and compares with its hash, which takes rank 0 some seconds."""


class PositionOptions(TypedDict):
    """Arguments of ``SampleSource`` that say how positions are counted."""

    long_documents: LongDocuments
    max_position: int


@dataclass(frozen=True, slots=True)
class ScoredText:
    """The text that validation scores: the first ``validation.num_samples`` samples, not all of the dataset."""

    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the tokens; EOS has no bytes."""
    unigram_bits: float


class ValidationSet:
    """The samples of a validation dataset that are scored, and the properties of their text."""

    def __init__(self, prefix: str, config: Config, ranks: Ranks, tokenizer: Tokenizer) -> None:
        self._config, self._ranks, self._tokenizer = config, ranks, tokenizer
        self.dataset = open_dataset(localize(prefix, config.data.cache_directory), tokenizer, config.model.vocab_size)
        check_validation_kind(config, prefix, self.dataset)
        self._packed = _validation_source(self.dataset, config)
        # This is not a collective, because a rank that could not open its files would not take part. The ranks agree later, on the result
        # of opening all data.
        if ranks.is_main:
            verify(self.dataset)

    @property
    def num_samples(self) -> int:
        """The number of samples that are scored, over all ranks."""
        return min(self._config.validation.num_samples, self._packed.num_samples_per_epoch)

    def batches(self) -> Iterator[PackedBatch]:
        """Return this rank's validation micro-batches. Every rank has the same number."""
        return validation_batches(
            self._packed,
            self._config.validation.num_samples,
            self._config.training.micro_batch_size,
            self._ranks.data_parallel_rank,
            self._ranks.data_parallel_size,
            self._ranks.device,
        )

    @cached_property
    def _text(self) -> ScoredText | None:
        """The text that is scored; None if the tokenizer is not a byte-level tokenizer."""
        num_bytes_by_token = self._tokenizer.num_bytes_by_token()
        if num_bytes_by_token is None:
            logger.warning("%s is no byte-level tokenizer: validation has no bits per byte", self._config.data.tokenizer)
            return None
        vocab_size = max(self._config.model.vocab_size, len(num_bytes_by_token))
        counts = validation_token_counts(self._packed, self._config.validation.num_samples, vocab_size)
        num_bytes = int(counts[: len(num_bytes_by_token)] @ num_bytes_by_token)
        return ScoredText(int(counts.sum()), num_bytes, unigram_bits(counts)) if num_bytes else None

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """Convert nats per token of the scored samples to bits per UTF-8 byte. None if the number of bytes is not known."""
        text = self._text
        return None if text is None else nats_per_token * text.num_tokens / (text.num_bytes * math.log(2))

    @property
    def unigram_bits_per_byte(self) -> float | None:
        """The bits per byte of the scored samples under the order-0 model of their own token frequencies, to compare validation with."""
        text = self._text
        return None if text is None else text.unigram_bits / text.num_bytes


class ValidationData:
    """The tokenizer and the validation sets, opened.

    Raises:
        TokenizerError, DatasetError: a file is missing, damaged, or does not fit the run's tokenizer or vocabulary.
        UserError: the mask token is not the tokenizer's.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._open_tokenizer(config, ranks)
        self._open_validation()

    def _open_tokenizer(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.tokenizer = Tokenizer.load(config.data.tokenizer)
        self._check_mask_token()

    def _open_validation(self) -> None:
        data = self.config.data
        if data.validation is None:
            logger.info("data.validation is not set: no validation")
        prefixes = {"": data.validation, **data.validation_sets} if data.validation is not None else {}
        self.validation_sets = {
            name: ValidationSet(prefix, self.config, self.ranks, self.tokenizer) for name, prefix in prefixes.items() if prefix is not None
        }
        """The sets by name. The set of data.validation has the name "" and is the first. Empty without validation."""

    @property
    def validation(self) -> ValidationSet | None:
        """The set of data.validation, whose scores rank checkpoints; None without validation."""
        return self.validation_sets.get("")

    @property
    def validation_unigram_bits_per_byte(self) -> float | None:
        """``ValidationSet.unigram_bits_per_byte`` of data.validation; None without validation."""
        return None if self.validation is None else self.validation.unigram_bits_per_byte

    def _check_mask_token(self) -> None:
        mask = self.config.diffusion.mask_token_id
        if mask != self.tokenizer.mask_token_id:
            raise UserError(
                f"diffusion.mask_token_id is {mask}, but the mask token of {self.config.data.tokenizer} is "
                f"{self.tokenizer.mask_token_id}; set diffusion.mask_token_id={self.tokenizer.mask_token_id} or train a tokenizer with "
                f"--mask-token-id {mask}"
            )


def stage_weights(config: Config, stage_name: str) -> dict[str, float]:
    """Return the datasets that a stage reads: their weights by their prefixes."""
    stage, blend = config.schedule.stages[stage_name], config.data.blend
    if stage.train is not None:
        return {stage.train: 1.0}
    if stage.blend:
        return {blend[name].prefix: weight for name, weight in stage.blend.items() if weight > 0}
    if blend:
        return {corpus.prefix: corpus.weight for corpus in blend.values() if corpus.weight > 0}
    assert config.data.train is not None, "the configuration was not validated"
    return {config.data.train: 1.0}


def stage_texts(config: Config) -> tuple[list[StageText], int]:
    """Return the datasets of each stage that has a step, and the number of samples of the whole run."""
    steps = stage_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
    texts, num_samples = [], 0
    for name, (first, num_steps) in steps.items():
        if num_steps > 0:
            stage = at_stage(config, name)
            texts.append(StageText(first, stage_weights(config, name), repeats=stage.diffusion.samples_per_text))
            num_samples = first + num_steps * stage.training.global_batch_size
    return texts, num_samples


def training_prefixes(config: Config) -> list[str]:
    """Return the prefixes of all training datasets of the run, in the order of their use."""
    return list(dict.fromkeys(prefix for text in stage_texts(config)[0] for prefix in text.weights))


def prepare_data(config: Config) -> None:
    """Copy and pack the training datasets, which takes long, once on each machine.

    Every rank calls this function. One rank of each machine does the work, while the others wait for its lock: in a collective they would
    give up after minutes. A single rank of the run is not enough, because data.cache_directory may be each machine's own.

    Raises:
        DatasetError: a dataset is missing or damaged.
        OSError: the packing cannot be written.
    """
    data = config.data
    if data.packing != "best_fit":
        return
    for prefix in training_prefixes(config):
        dataset = open_dataset(localize(prefix, data.cache_directory))
        ensure_packing(dataset, packing_options(config), data.cache_directory, spare_packings(config))


def packing_options(config: Config) -> PackingOptions:
    """Return the settings that the best-fit packing of a dataset depends on."""
    data = config.data
    return PackingOptions(sequence_length=data.sequence_length, align=data.align, eos=data.eos, seed=data.packing_seed)


def spare_packings(config: Config) -> Path:
    """Return the directory of the packings of datasets whose own directories cannot be written to. It is in the run directory, which all
    ranks see."""
    return RunDirectory(Path(config.runs_dir) / config.name).packings


def position_options(config: Config) -> PositionOptions:
    """Return the settings for the positions of documents that are cut."""
    max_position = max(config.model.max_sequence_length, config.data.sequence_length)
    return {"long_documents": config.data.long_documents, "max_position": max_position}


def fill_of(dataset: TokenDataset, config: Config) -> Fill | None:
    """Return what follows the end of a document.

    Raises:
        DatasetError: the dataset has no manifest, which says what EOS is.
    """
    data = config.data
    if data.fill == "none":
        return None
    if dataset.manifest is None:
        raise DatasetError(f"dataset {dataset.prefix} has no manifest, so data.fill={data.fill} is not possible: its EOS is not known")
    size = {"block": data.align, "batch": data.fill_group, "sample": data.sequence_length}[data.fill]
    return Fill(data.fill, size, dataset.manifest.eos_token_id)


def _separate(dataset: TokenDataset, config: Config, seed: int) -> SeparateDataset:
    data = config.data
    kind, fill = kind_of(dataset), fill_of(dataset, config)
    pairs = has_preferences(config) if kind is None else kind == "preferences"
    return SeparateDataset(dataset, data.sequence_length, seed, pairs=pairs, eos=data.eos, fill=fill)


def _validation_source(dataset: TokenDataset, config: Config) -> SampleSource:
    """Return the samples of a validation dataset, which are the same in every run.

    Plain text is cut, whatever data.packing is: no padding is scored, and no packing has to be built. Text of which a part may not be
    noised is scored document by document: a reply needs its prompt.
    """
    data = config.data
    if dataset.limits_noise and data.packing != "cut":
        return _separate(dataset, config, 0)
    return PackedDataset(dataset, data.sequence_length, seed=0, **position_options(config), eos=data.eos)


def open_source(dataset: TokenDataset, config: Config) -> SampleSource:
    """Open the training samples of a dataset, packed as the configuration says.

    Raises:
        DatasetError: the dataset does not fill one sample, a conversation would be cut, or the best-fit packing has not been built.
    """
    data, seed = config.data, config.training.seed
    check_whole_conversations(config, dataset)
    if dataset.num_tokens < data.sequence_length and data.packing != "separate":
        # Training on the padding would work, and waste the run: the file or the sequence length must be wrong.
        raise DatasetError(f"dataset {dataset.prefix} has {dataset.num_tokens} tokens, fewer than one sample of {data.sequence_length}")
    if data.packing == "best_fit":
        spare, fill = spare_packings(config), fill_of(dataset, config)
        options, directory = packing_options(config), data.cache_directory
        positions = position_options(config)
        return BestFitDataset(dataset, options, seed, directory=directory, spare_directory=spare, fill=fill, **positions)
    if data.packing == "separate":
        return _separate(dataset, config, seed)
    return PackedDataset(dataset, data.sequence_length, seed, **position_options(config), eos=data.eos)


class TrainingData(ValidationData):
    """The tokenizer, the training texts and the validation sets, opened. :func:`prepare_data` must have prepared the training datasets.

    Raises:
        TokenizerError, DatasetError: as ValidationData; or a validation dataset is also a training dataset.
        BlendError: the schedule reads a corpus more often than its max_epochs allows.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._open_tokenizer(config, ranks)
        self._open_training()
        self._open_validation()
        self._check_validation_is_apart()
        self.loader = self._open_loader()

    def _open_training(self) -> None:
        config = self.config
        texts, num_samples = stage_texts(config)
        self.train = {
            prefix: open_dataset(localize(prefix, config.data.cache_directory), self.tokenizer, config.model.vocab_size)
            for prefix in training_prefixes(config)
        }
        check_kinds(config, self.train, {name: stage_weights(config, name) for name in config.schedule.stages})
        sources = {prefix: open_source(dataset, config) for prefix, dataset in self.train.items()}
        limits = {
            corpus.prefix: int(corpus.max_epochs * sources[corpus.prefix].num_samples_per_epoch)
            for corpus in config.data.blend.values()
            if corpus.max_epochs is not None and corpus.prefix in sources
        }
        parts = stretches(texts, num_samples, limits, drop_exhausted=config.data.at_max_epochs == "drop")
        self.samples = StagedSamples(parts, sources)
        if self.ranks.is_main:
            for dataset in self.train.values():
                verify(dataset)
        # A cache directory may be each machine's own, with a packing of its own.
        own_cache = config.data.cache_directory is not None and os.environ.get("LOCAL_RANK", "0") == "0"
        for source in sources.values():
            if isinstance(source, BestFitDataset) and (self.ranks.is_main or own_cache):
                verify_packing(source.index)

    def _open_loader(self) -> BatchLoader | DaliLoader:
        data, ranks = self.config.data, self.ranks
        common = {
            "micro_batch_size": self.config.training.micro_batch_size,
            "data_parallel_rank": ranks.data_parallel_rank,
            "data_parallel_size": ranks.data_parallel_size,
            "num_workers": data.num_workers,
            "prefetch": data.prefetch,
        }
        if data.loader == "dali":
            return DaliLoader(self.samples, **common, device=ranks.device)
        return BatchLoader(self.samples, **common, device=ranks.device, workers=data.workers, read_timeout=data.read_timeout)

    def _check_validation_is_apart(self) -> None:
        """Raise DatasetError if a validation dataset is a training dataset: its scores would say nothing about unseen text."""
        trained = {identity(part): part.prefix for dataset in self.train.values() for part in dataset.parts}
        for validation in self.validation_sets.values():
            for part in validation.dataset.parts:
                twin = trained.get(identity(part))
                if twin is not None:
                    raise DatasetError(f"validation dataset {part.prefix} is training dataset {twin}: the same tokens, by their hash")

    def fingerprint(self, num_samples: int) -> str | None:
        """Return the SHA-256 of the training tokens that the first ``num_samples`` samples come from, and of their noise limits; of
        several datasets, the SHA-256 of their hashes in the order of their use. None if a dataset has no manifest."""
        begun = dict.fromkeys(name for part in self.samples.parts if part.first < max(num_samples, 1) for name in part.interleave.names)
        hashes = [None if (manifest := self.train[prefix].manifest) is None else manifest.content_sha256 for prefix in begun]
        known = [digest for digest in hashes if digest is not None]
        if len(known) < len(hashes):
            return None
        return known[0] if len(known) == 1 else hashlib.sha256("".join(known).encode()).hexdigest()

    def bits_per_byte(self, nats_per_token: float, num_samples: int) -> float | None:
        """Convert nats per token to bits per UTF-8 byte of the text that the last of ``num_samples`` samples comes from. For a blend this
        is an average over its corpora. The result is None if a dataset has no manifest."""
        weights = self.samples.part(max(num_samples - 1, 0)).weights
        datasets = {self.train[prefix]: weight for prefix, weight in weights.items() if weight > 0}
        return bits_per_byte(nats_per_token, datasets, self.config.data.eos)

    def step_metrics(self, elbo: float, num_samples: int) -> dict[str, float | None]:
        """Return the metrics of a step that depend on the data, after ``num_samples`` of the run.

        Args:
            elbo: the ELBO of the step, in nats per token.
        """
        bits = self.bits_per_byte(elbo, num_samples)
        return {"elbo_bits_per_byte": bits, "epoch": self.samples.epoch(num_samples), **self._corpus_metrics(num_samples)}

    def _corpus_metrics(self, num_samples: int) -> dict[str, float]:
        """Return the tokens seen (of all samples that were begun) and the passes of each corpus of a blend, after ``num_samples`` samples
        of the run."""
        names = {corpus.prefix: name for name, corpus in self.config.data.blend.items()}
        epochs, found = self.samples.epochs(num_samples), {}
        for prefix, count in self.samples.num_read(num_samples).items():
            if prefix in names:
                found[f"corpus_tokens/{names[prefix]}"] = float(count * self.samples.sequence_length)
                found[f"corpus_epochs/{names[prefix]}"] = epochs[prefix]
        return found

    @property
    def num_tokens(self) -> int:
        """The number of tokens of all training datasets."""
        return sum(dataset.num_tokens for dataset in self.train.values())


def identity(dataset: TokenDataset) -> str:
    """Return what identifies a dataset: the hash of its tokens, or the path of its file if it has no manifest."""
    return str(bin_path(dataset.prefix).resolve()) if dataset.manifest is None else dataset.manifest.bin_sha256


def verify(dataset: TokenDataset) -> None:
    """Compare the files of a dataset with the hashes in its manifest, on one rank: a run would not notice damage that keeps the size.

    The log has the datasets that are not compared: those without a manifest, and those larger than ``MAX_VERIFIED_BYTES``.

    Raises:
        DatasetError: a file is not what was written.
    """
    if dataset.manifest is None:
        return  # TokenDataset.open has logged it
    num_bytes = sum(file_size(bin_path(part.prefix)) for part in dataset.parts)
    if num_bytes <= MAX_VERIFIED_BYTES:
        dataset.verify_hashes()
    else:
        first, others = bin_path(dataset.parts[0].prefix), len(dataset.parts) - 1
        logger.warning(
            "%s has %.1f GB: not compared with the hash in its manifest; `w1train data verify %s` compares it",
            f"{first} and {others} more" if others else first,
            num_bytes / 1e9,
            dataset.prefix,
        )


def verify_packing(packing: PackingIndex) -> None:
    """Compare a best-fit packing with the hash in its file, as :func:`verify` does.

    Raises:
        DatasetError: the file is not what was written.
    """
    if packing.num_bytes <= MAX_VERIFIED_BYTES:
        packing.verify_hash()
    else:
        logger.warning(
            "%s has %.1f GB: not compared with the hash in it; `w1train data verify %s` compares it",
            packing.path,
            packing.num_bytes / 1e9,
            packing.path,
        )


def bits_per_byte(nats_per_token: float, datasets: Mapping[TokenDataset, float], eos: EndOfDocument = "keep") -> float | None:
    """Convert nats per token to bits per UTF-8 byte of datasets with weights. The result is None if a dataset has no manifest, because the
    number of bytes is in the manifest."""
    num_bytes, total = 0.0, sum(datasets.values())
    for dataset, weight in datasets.items():
        if dataset.manifest is None:
            return None
        num_tokens = dataset.manifest.num_tokens - (dataset.manifest.num_documents if eos == "drop" else 0)
        num_bytes += weight / total * dataset.manifest.num_bytes / num_tokens
    return nats_per_token / (num_bytes * math.log(2))

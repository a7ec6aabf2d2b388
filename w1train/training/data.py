"""The run's data: tokenizer, training loader and validation set, checked before anything is allocated."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.config.stages import at_stage
from w1train.data.batch import PackedBatch
from w1train.data.dataset import TokenDataset
from w1train.data.indexed import bin_path, file_size
from w1train.data.loader import BatchLoader, validation_batches, validation_token_counts
from w1train.data.packing import PackedDataset
from w1train.data.staged import StagedSamples, stretches
from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import unigram_bits
from w1train.runtime.distributed import Ranks
from w1train.training.schedule import stage_steps

logger = logging.getLogger(__name__)

MAX_VERIFIED_BYTES = 4 * 2**30
"""Token files up to this size are read and compared with their manifest at every start: seconds on one rank."""


@dataclass(frozen=True, slots=True)
class ScoredText:
    """The samples that validation scores: the first ``validation.num_samples``, not all of the dataset."""

    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of the tokens; EOS has none."""
    unigram_bits: float


class ValidationData:
    """Opens tokenizer and validation set.

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
        config, length = self.config, self.config.data.sequence_length
        self.validation: TokenDataset | None = None
        self._packed_validation: PackedDataset | None = None
        if config.data.validation is None:
            logger.info("data.validation is not set: no validation")
        else:
            self.validation = TokenDataset.open(config.data.validation, self.tokenizer, config.model.vocab_size)
            self._packed_validation = PackedDataset(self.validation, length, seed=0, shuffle_samples=True, drop_last=False)
            # Without a collective: a rank that could not open its files is not here to take part. Opening as a whole is agreed upon.
            if self.ranks.is_main:
                verify(self.validation)

    def validation_batches(self) -> Iterator[PackedBatch]:
        """This rank's validation micro-batches; every rank has as many."""
        assert self._packed_validation is not None
        return validation_batches(
            self._packed_validation,
            self.config.validation.num_samples,
            self.config.training.micro_batch_size,
            self.ranks.data_parallel_rank,
            self.ranks.data_parallel_size,
            self.ranks.device,
        )

    @cached_property
    def _validation_text(self) -> ScoredText | None:
        """What is scored; None without validation or a byte-level tokenizer."""
        num_bytes_by_token = self.tokenizer.num_bytes_by_token()
        if self._packed_validation is None:
            return None
        if num_bytes_by_token is None:
            logger.warning("%s is no byte-level tokenizer: validation has no bits per byte", self.config.data.tokenizer)
            return None
        vocab_size = max(self.config.model.vocab_size, len(num_bytes_by_token))
        counts = validation_token_counts(self._packed_validation, self.config.validation.num_samples, vocab_size)
        num_bytes = int(counts[: len(num_bytes_by_token)] @ num_bytes_by_token)
        return ScoredText(int(counts.sum()), num_bytes, unigram_bits(counts)) if num_bytes else None

    def validation_bits_per_byte(self, nats_per_token: float) -> float | None:
        """Nats per token of the samples that validation scores in bits per UTF-8 byte of these samples."""
        text = self._validation_text
        return None if text is None else nats_per_token * text.num_tokens / (text.num_bytes * math.log(2))

    @property
    def validation_unigram_bits_per_byte(self) -> float | None:
        """What the order-0 model of the scored tokens' own frequencies needs for them: the figure to compare validation with."""
        text = self._validation_text
        return None if text is None else text.unigram_bits / text.num_bytes

    def _check_mask_token(self) -> None:
        mask = self.config.diffusion.mask_token_id
        if mask != self.tokenizer.mask_token_id:
            raise UserError(
                f"diffusion.mask_token_id is {mask}, but the mask token of {self.config.data.tokenizer} is "
                f"{self.tokenizer.mask_token_id}; set diffusion.mask_token_id={self.tokenizer.mask_token_id} or train a tokenizer with "
                f"--mask-token-id {mask}"
            )


def _stage_texts(config: Config) -> Iterator[tuple[int, str, int]]:
    """First sample, dataset and repeats of each stage that has a step."""
    steps = stage_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
    for name, (first, num_steps) in steps.items():
        if num_steps > 0:
            repeats = 2 if at_stage(config, name).diffusion.complementary else 1
            yield first, config.schedule.stages[name].train or config.data.train, repeats


class TrainingData(ValidationData):
    """Opens tokenizer, training texts and validation set.

    Raises:
        TokenizerError, DatasetError: as ValidationData.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._open_tokenizer(config, ranks)
        self._open_training()
        self._open_validation()
        self.loader = BatchLoader(
            self.samples,
            micro_batch_size=config.training.micro_batch_size,
            data_parallel_rank=ranks.data_parallel_rank,
            data_parallel_size=ranks.data_parallel_size,
            num_workers=config.data.num_workers,
            prefetch=config.data.prefetch,
            device=ranks.device,
        )

    def _open_training(self) -> None:
        config, length = self.config, self.config.data.sequence_length
        parts = stretches(list(_stage_texts(config)))
        prefixes = dict.fromkeys(part.prefix for part in parts)
        self.train = {prefix: TokenDataset.open(prefix, self.tokenizer, config.model.vocab_size) for prefix in prefixes}
        packed = {
            prefix: PackedDataset(dataset, length, config.training.seed, shuffle_samples=True) for prefix, dataset in self.train.items()
        }
        self.samples = StagedSamples(parts, packed)
        if self.ranks.is_main:
            for dataset in self.train.values():
                verify(dataset)

    def fingerprint(self, num_samples: int) -> str | None:
        """SHA-256 of the training tokens that the first ``num_samples`` samples come from; of several datasets, that of their hashes in
        the order of their use. None if one of them has no manifest."""
        begun = dict.fromkeys(part.prefix for part in self.samples.parts if part.first < max(num_samples, 1))
        hashes = [None if (manifest := self.train[prefix].manifest) is None else manifest.bin_sha256 for prefix in begun]
        known = [digest for digest in hashes if digest is not None]
        if len(known) < len(hashes):
            return None
        return known[0] if len(known) == 1 else hashlib.sha256("".join(known).encode()).hexdigest()

    def bits_per_byte(self, nats_per_token: float, num_samples: int) -> float | None:
        """Nats per token in bits per UTF-8 byte of the text that the last of ``num_samples`` samples comes from."""
        return bits_per_byte(nats_per_token, self.train[self.samples.part(max(num_samples - 1, 0)).prefix])

    @property
    def num_tokens(self) -> int:
        """Tokens of all training datasets."""
        return sum(dataset.num_tokens for dataset in self.train.values())


def verify(dataset: TokenDataset) -> None:
    """Compare the files with the hashes in their manifest, on one rank: damage of the right size would train in silence.

    What is not compared (no manifest, or more than ``MAX_VERIFIED_BYTES``) is said in the log.

    Raises:
        DatasetError: if a file is not what was written.
    """
    if dataset.manifest is None:
        return  # TokenDataset.open has said so
    num_bytes = file_size(bin_path(dataset.prefix))
    if num_bytes <= MAX_VERIFIED_BYTES:
        dataset.verify_hashes()
    else:
        logger.warning(
            "%s has %.1f GB: not compared with the hash in its manifest; `python -m data_tools.verify %s` compares it",
            bin_path(dataset.prefix),
            num_bytes / 1e9,
            dataset.prefix,
        )


def bits_per_byte(nats_per_token: float, dataset: TokenDataset) -> float | None:
    """Nats per token in bits per UTF-8 byte of the dataset's text; None without a manifest, which knows the bytes."""
    manifest = dataset.manifest
    return None if manifest is None else nats_per_token * manifest.num_tokens / (manifest.num_bytes * math.log(2))

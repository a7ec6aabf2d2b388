"""The samples of a run in one global order, in which each stage of the schedule may mix corpora with its own weights.

The index of a sample determines its stretch of the order, hence its corpus, and which of the corpus's samples it is. Nothing is counted
while samples are read, so every rank, worker and resumed run finds the same sample at the same index.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from w1train.config.errors import UserError
from w1train.data.batch import Sample
from w1train.data.packed.interleave import Interleave
from w1train.data.packed.packing import SampleSource


class StageText(NamedTuple):
    """The part of the global order that a stage of the schedule reads."""

    first: int
    """First sample of the stage in the run's global order."""
    weights: Mapping[str, float]
    """Shares of the stage's samples, by corpus."""
    repeats: int = 1
    """The number of times that each sample is read in a row: 2 for the pairs of complementary masking, otherwise 1."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive samples of the global order that are dealt to corpora by the same weights."""

    first: int
    """Global index of the first sample."""
    weights: Mapping[str, float]
    """Shares of the samples, by corpus."""
    offsets: Mapping[str, int]
    """The first sample that is read of each corpus, by its number in the corpus."""
    repeats: int = 1
    """How many times in a row each sample is read."""
    interleave: Interleave = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "interleave", Interleave(self.weights))

    def texts(self, end: int) -> dict[str, int]:
        """Return how many samples of each corpus are read up to global index ``end``. If ``end`` lies between the samples of a pair, the
        pair counts."""
        return self.interleave.counts(-(-max(end - self.first, 0) // self.repeats))


class BlendError(UserError):
    """The error of a blend that reads a corpus more often than allowed."""


def stretches(
    stages: Sequence[StageText], num_samples: int, limits: Mapping[str, int] | None = None, *, drop_exhausted: bool = False
) -> list[Stretch]:
    """Divide the run into stretches. A stage continues to read a corpus where an earlier stage stopped.

    Args:
        num_samples: number of samples of the run.
        limits: the most samples that may be read of a corpus in the whole run, for each corpus with a limit.
        drop_exhausted: leave out a corpus from the sample on at which it reaches its limit, and let the others fill its place.

    Raises:
        BlendError: if a corpus would exceed its limit or, with ``drop_exhausted``, all corpora of a stage have reached theirs.
    """
    found: list[Stretch] = []
    used: dict[str, int] = {}
    ends = [stage.first for stage in stages[1:]] + [num_samples]
    for stage, end in zip(stages, ends, strict=True):
        weights, first = dict(stage.weights), stage.first
        while True:
            part = Stretch(first, weights, {name: used.get(name, 0) for name in weights}, stage.repeats)
            stop, exhausted = _first_exhausted(part, end, limits or {})
            if exhausted and not drop_exhausted:
                raise BlendError(_too_often(part, end, limits or {}))
            if stop > first:
                found.append(part)
                used |= {name: used.get(name, 0) + count for name, count in part.texts(stop).items()}
            if not exhausted:
                break
            first, weights = stop, {name: weight for name, weight in weights.items() if name not in exhausted}
            if not any(weights.values()):
                raise BlendError(
                    f"after {first} of the run's {num_samples} samples every corpus of the stage has been read as often as its max_epochs "
                    "allows: raise one, add a corpus, or end the schedule there"
                )
    return found


def _first_exhausted(part: Stretch, end: int, limits: Mapping[str, int]) -> tuple[int, set[str]]:
    """Return where a stretch must stop because corpora have reached their limits, and the set of these corpora.

    A stretch that can continue to ``end`` gives ``end`` and an empty set.
    """

    def too_many(num_texts: int) -> set[str]:
        counts = part.interleave.counts(num_texts)
        return {name for name, count in counts.items() if part.offsets[name] + count > limits.get(name, part.offsets[name] + count)}

    num_texts = -(-(end - part.first) // part.repeats)
    if not too_many(num_texts):
        return end, set()
    # Find the first text that a corpus would have to give beyond its limit.
    low, high = 0, num_texts
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if too_many(middle) else (middle, high)
    return part.first + low * part.repeats, too_many(high)


def _too_often(part: Stretch, end: int, limits: Mapping[str, int]) -> str:
    lines = [
        f"{name}: {part.offsets[name] + count} samples are asked for, max_epochs allows {limits[name]}"
        for name, count in part.texts(end).items()
        if part.offsets[name] + count > limits.get(name, part.offsets[name] + count)
    ]
    advice = "lower its weight, raise its max_epochs, shorten the schedule, or set data.at_max_epochs=drop to continue without it"
    return "\n".join(["the schedule reads corpora more often than they may be read:", *lines, advice])


class StagedSamples:
    """The samples of the run, from all corpora."""

    def __init__(self, parts: Sequence[Stretch], sources: Mapping[str, SampleSource]) -> None:
        self.parts, self.sources = list(parts), dict(sources)
        (self.sequence_length,) = {source.sequence_length for source in sources.values()}
        self._firsts = [part.first for part in self.parts]

    def part(self, global_index: int) -> Stretch:
        """Return the stretch that a sample belongs to."""
        return self.parts[bisect_right(self._firsts, global_index) - 1]

    def locate(self, global_index: int) -> tuple[str, int]:
        """Return the corpus of a sample, and the sample's number in the corpus."""
        part = self.part(global_index)
        name, number = part.interleave.locate((global_index - part.first) // part.repeats)
        return name, part.offsets[name] + number

    def sample(self, global_index: int) -> Sample:
        """Return the sample at a global index; its errors are those of ``SampleSource.sample``."""
        name, index = self.locate(global_index)
        return self.sources[name].sample(index)

    def num_read(self, num_samples: int) -> dict[str, int]:
        """Return how many samples of each corpus are among the first ``num_samples`` samples of the run; a pair counts as one."""
        if num_samples == 0:
            return dict.fromkeys(self.sources, 0)
        last = self.parts.index(self.part(num_samples - 1))
        read = dict.fromkeys(self.sources, 0)
        for part, end in zip(self.parts[: last + 1], [*self._firsts[1 : last + 1], num_samples], strict=True):
            for name, count in part.texts(end).items():
                read[name] += count
        return read

    def epochs(self, num_samples: int) -> dict[str, float]:
        """Return the number of passes through each corpus after ``num_samples`` samples of the run."""
        return {name: count / self.sources[name].num_samples_per_epoch for name, count in self.num_read(num_samples).items()}

    def epoch(self, num_samples: int) -> float:
        """Return the number of passes through the corpus that the last of ``num_samples`` samples belongs to.

        In a blend it is the largest number among the corpora of the stretch.
        """
        epochs = self.epochs(num_samples)
        return max(epochs[name] for name in self.part(max(num_samples - 1, 0)).interleave.names)

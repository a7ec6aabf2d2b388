"""Which keys of a run may change between two starts of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from w1train.config.errors import Problem, listing, show
from w1train.config.schema import Config, ScheduleConfig, StageConfig
from w1train.config.serialization import ABSENT, Difference, config_differences

# What changes neither the model nor the stream of noisy samples it is trained on. The micro-batch goes with the layout: it only says
# how a global batch is cut up. The schedule is judged on its own, by what has been consumed.
ALLOWED_ON_RESUME = (
    "name",
    "runs_dir",
    "data.validation_sets*",
    "data.loader",
    "data.workers",
    "data.num_workers",
    "data.prefetch",
    "data.read_timeout",
    "data.cache_directory",
    "parallel.[!d]*",  # all but distributed_optimizer: its states have another form in the checkpoint
    "training.micro_batch_size",
    "attention.*",  # another kernel, the same function
    "training.loss_chunk_size",
    "kernels.*",
    "validation.interval",
    "sampling.*",
    "checkpoint.*",
    "logging.*",
    "health.*",
)
# Files may move while a run waits. Whether they still hold what the run began with is told by the hash of the training tokens that the
# checkpoint has, and the hash of the tokenizer that the tokens have.
_MAY_MOVE = ("data.train", "data.blend.*.prefix", "data.validation", "data.tokenizer")
_SCHEDULE_RULE = "the schedule of tokens not yet consumed: new or changed future stages, a longer or shorter running constant stage"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stretch of the schedule that has begun; positions in tokens."""

    name: str
    start: int
    end: int
    style: str
    first_rate: float
    last_rate: float
    batch_size: int
    others: str
    """What else the stage sets."""

    def same_training(self, other: _Piece) -> bool:
        """Whether both give the same learning rate and batch size to the same tokens, whatever the stages are called."""
        return replace(self, name="") == replace(other, name="")

    def __str__(self) -> str:
        rates = f"{show(self.last_rate)}" if self.style == "constant" else f"{show(self.first_rate)} to {show(self.last_rate)}"
        others = f" with {self.others}" if self.others else ""
        return f"{self.style} {rates} for tokens {self.start} to {self.end} in batches of {self.batch_size}{others}"


def allowed_on_resume(key: str, patterns: Iterable[str] = ALLOWED_ON_RESUME) -> bool:
    """Whether a key may change freely when a run directory is resumed."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def check_resume(old: Config, new: Config, tokens_consumed: int, *, data_are_hashed: bool = True) -> list[Problem]:
    """Every change that would make the resumed run another run.

    Args:
        tokens_consumed: tokens the checkpoint has been trained on; learning rate and batch size up to there must be what they were.
        data_are_hashed: whether the checkpoint knows the hash of its training tokens, which then may lie elsewhere.
    """
    changes = [change for change in config_differences(old, new) if not change.key.startswith("schedule.")]
    patterns = ALLOWED_ON_RESUME + (_MAY_MOVE if data_are_hashed else ())
    forbidden = [_forbidden(change) for change in changes if not allowed_on_resume(change.key, patterns)]
    return forbidden + list(_check_schedule(old, new.schedule, tokens_consumed))


def _forbidden(change: Difference) -> Problem:
    reason = f"{_show(change.old)}, as the run began with; it is part of what the checkpoints are. May change: {_allowed_text()}"
    return Problem(change.key, _show(change.new), reason, "start a run of another name")


def _check_schedule(old: Config, new: ScheduleConfig, tokens_consumed: int) -> Iterator[Problem]:
    """The first stage that has begun and is not what it was (all later ones follow from it)."""
    consumed = min(tokens_consumed, sum(stage.tokens for stage in old.schedule.stages.values()))
    # The old default for both: a change of it is forbidden by its own key, and reported once.
    default = old.training.global_batch_size
    for before, after in zip_longest(_begun(old.schedule, default, consumed), _begun(new, default, consumed)):
        if before is not None and after is not None and before.same_training(after):
            continue
        name = (before or after).name
        found = f"{after or 'no stage'}, where the run had {before or 'no stage'}"
        valid = f"the same up to the {consumed} tokens consumed. May change: {_SCHEDULE_RULE}"
        yield Problem(f"schedule.stages.{name}", found, valid, "add a stage after it, or start a run of another name")
        return


def _begun(schedule: ScheduleConfig, default_batch_size: int, consumed: int) -> Iterator[_Piece]:
    """The pieces that begin before ``consumed``. What is left of a constant one is cut off, for its length says nothing about the past."""
    start, rate = 0, 0.0
    for name, stage in schedule.stages.items():
        if start >= consumed:
            return
        end = start + stage.tokens
        seen = min(end, consumed) if stage.style == "constant" else end
        first_rate = stage.learning_rate if stage.style == "constant" else rate
        batch_size = default_batch_size if stage.global_batch_size is None else stage.global_batch_size
        yield _Piece(name, start, seen, stage.style, first_rate, stage.learning_rate, batch_size, _others(stage))
        start, rate = end, stage.learning_rate


def _others(stage: StageConfig) -> str:
    others = {"rewarm_tokens": stage.rewarm_tokens, "train": stage.train, "blend": stage.blend, **stage.diffusion}
    unset: dict[str, object] = {"rewarm_tokens": 0, "train": None, "blend": {}}
    return ", ".join(f"{key}={show(value)}" for key, value in others.items() if key in stage.diffusion or value != unset[key])


def _show(value: object) -> str:
    return str(value) if value is ABSENT else show(value)


def _allowed_text() -> str:
    return f"{listing(ALLOWED_ON_RESUME)}; {listing(_MAY_MOVE)} (the same data elsewhere); {_SCHEDULE_RULE}"

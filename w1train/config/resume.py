"""The check of a configuration against the configuration that a run began with, and the list of keys that may change on resume."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from w1train.config.errors import Problem, listing, show
from w1train.config.schema import Config, ScheduleConfig, StageConfig
from w1train.config.serialization import ABSENT, Difference, config_differences

# These keys change neither the model nor the stream of noisy samples. training.micro_batch_size belongs to the layout: it only says how a
# global batch is divided. The schedule has a check of its own, which depends on the tokens consumed.
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
    "parallel.[!d]*",  # all keys except distributed_optimizer, whose states have another form in the checkpoint
    "training.micro_batch_size",
    "attention.*",  # another kernel computes the same function
    "training.loss_chunk_size",
    "reference.weights",  # the checkpoint has the hash of the reference's weights
    "kernels.*",
    "validation.interval",
    "sampling.*",
    "checkpoint.*",
    "logging.*",
    "health.*",
    "profiling.*",
)
# Files may move between two starts. The checkpoint has a hash of the training tokens, and the tokens have a hash of the tokenizer: these
# tell whether the files still hold what the run began with.
_MAY_MOVE = ("data.train", "data.blend.*.prefix", "data.validation", "data.tokenizer")
_SCHEDULE_RULE = "the schedule of tokens not yet consumed: new or changed future stages, a longer or shorter running constant stage"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of the schedule that has begun. ``start`` and ``end`` are in tokens."""

    name: str
    start: int
    end: int
    style: str
    first_rate: float
    last_rate: float
    batch_size: int
    others: str
    """Everything else that the stage sets, as text."""

    def same_training(self, other: _Piece) -> bool:
        """Tell whether both parts train the same tokens in the same way. The stages' names may differ."""
        return replace(self, name="") == replace(other, name="")

    def __str__(self) -> str:
        rates = f"{show(self.last_rate)}" if self.style == "constant" else f"{show(self.first_rate)} to {show(self.last_rate)}"
        others = f" with {self.others}" if self.others else ""
        return f"{self.style} {rates} for tokens {self.start} to {self.end} in batches of {self.batch_size}{others}"


def allowed_on_resume(key: str, patterns: Iterable[str] = ALLOWED_ON_RESUME) -> bool:
    """Tell whether a key may change freely when a run is resumed."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def check_resume(old: Config, new: Config, tokens_consumed: int, *, data_are_hashed: bool = True) -> list[Problem]:
    """Return a problem for every change that would make the resumed run another run.

    Args:
        tokens_consumed: tokens on which the checkpoint has been trained. The schedule of these tokens must not change.
        data_are_hashed: True if the checkpoint has the hash of its training tokens. The files of the tokens may then have moved.
    """
    changes = [change for change in config_differences(old, new) if not change.key.startswith("schedule.")]
    patterns = ALLOWED_ON_RESUME + (_MAY_MOVE if data_are_hashed else ())
    forbidden = [_forbidden(change) for change in changes if not allowed_on_resume(change.key, patterns)]
    return forbidden + list(_check_schedule(old, new.schedule, tokens_consumed))


def _forbidden(change: Difference) -> Problem:
    reason = f"{_show(change.old)}, as the run began with; checkpoints depend on it. May change: {_allowed_text()}"
    return Problem(change.key, _show(change.new), reason, "start a run of another name")


def _check_schedule(old: Config, new: ScheduleConfig, tokens_consumed: int) -> Iterator[Problem]:
    """Yield a problem for the first stage that has begun and has changed; later stages differ as a consequence."""
    consumed = min(tokens_consumed, sum(stage.tokens for stage in old.schedule.stages.values()))
    # Both schedules are read with the old default batch size: a change of the default is reported at its own key.
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
    """Yield the parts that begin before ``consumed``. A constant part ends at ``consumed``, because its length does not affect the past."""
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

"""Rules of checkpoints: which are kept, averaged and uploaded."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.divisibility import does_not_divide, near
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.config.schema_operation import UPLOAD_URL


def _best_checkpoints_rule(config: Config) -> Iterator[Problem]:
    """Check that there is a validation at each checkpoint's step: a checkpoint without this score could never be kept."""
    checkpoint, interval = config.checkpoint, config.validation.interval
    if checkpoint.average_at_end and checkpoint.keep_best < 2:
        yield Problem("checkpoint.average_at_end", "true", "false, or checkpoint.keep_best of at least 2: an average needs two checkpoints")
    if checkpoint.keep_best < 1:
        return
    if config.data.validation is None:
        yield Problem(
            "checkpoint.keep_best",
            show(checkpoint.keep_best),
            "0 without data.validation: only validation tells which checkpoints are the best",
        )
    elif does_not_divide(interval, checkpoint.interval):
        valid = f"with checkpoint.keep_best, a multiple of validation.interval ({interval})"
        yield Problem("checkpoint.interval", show(checkpoint.interval), valid, near(checkpoint.interval, interval))


def _keep_every_rule(config: Config) -> Iterator[Problem]:
    """Check that there is a checkpoint at each step whose checkpoint shall be kept."""
    checkpoint = config.checkpoint
    if checkpoint.keep_every > 0 and does_not_divide(checkpoint.interval, checkpoint.keep_every):
        valid = f"0, or a multiple of checkpoint.interval ({checkpoint.interval})"
        yield Problem("checkpoint.keep_every", show(checkpoint.keep_every), valid, near(checkpoint.keep_every, checkpoint.interval))


def _upload_rule(config: Config) -> Iterator[Problem]:
    upload = config.checkpoint.upload
    if upload and "://" not in upload:
        yield Problem("checkpoint.upload", show(upload), UPLOAD_URL)


CHECKPOINT_RULES: tuple[Rule, ...] = (_best_checkpoints_rule, _keep_every_rule, _upload_rule)

"""The rules for which checkpoints are kept: the newest, a checkpoint of every ``checkpoint.keep_every`` steps for ever, and the best of the
phase.

The choice depends only on the steps and scores of all checkpoints so far, and not on when it is made, so that a kill between a save and the
removal changes nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.commit import remove_checkpoint
from w1train.checkpoints.manifest import DamagedCheckpointError, complete_steps, read_scores
from w1train.config.schema_operation import CheckpointConfig, cost
from w1train.runtime.pulse import moved

logger = logging.getLogger(__name__)


def remove_old(directory: Path, settings: CheckpointConfig, phase_start: int, *, in_use: Collection[int] = ()) -> None:
    """Remove the checkpoints of steps that the settings do not keep. Only rank 0 calls this.

    Args:
        phase_start: only checkpoints of later steps than this are among the best.
        in_use: steps of checkpoints that are being read. The next call removes them.
    """
    steps = complete_steps(directory)
    best = best_steps(directory, settings.keep_best, settings.best_metric, after=phase_start)
    limits = f"checkpoint.keep={settings.keep}, checkpoint.keep_every={settings.keep_every}, checkpoint.keep_best={settings.keep_best}"
    for step in sorted({*steps} - kept_steps(steps, best, settings.keep, settings.keep_every) - {*in_use}):
        logger.info("removing checkpoint of step %d (%s)", step, limits)
        path = step_path(directory, step)
        try:
            remove_checkpoint(path)
            moved()
        except OSError as error:
            logger.warning("could not remove checkpoint %s: %s. Training continues; the next start removes the rest", path, error)


def kept_steps(steps: Collection[int], best: Collection[int], keep: int, keep_every: int) -> set[int]:
    """Return the steps whose checkpoints are kept.

    Args:
        steps: the steps of all checkpoints.
        best: the steps among them that are kept for their scores.
        keep: the number of newest checkpoints that are kept.
        keep_every: checkpoints of multiples of this step are kept for ever; 0 = no checkpoint is kept for this reason.
    """
    for_ever = {step for step in steps if keep_every > 0 and step % keep_every == 0}
    return {*sorted(steps)[-keep:], *best, *for_ever}


def best_steps(directory: Path, count: int, metric: str, *, after: int = 0) -> list[int]:
    """Return the steps of the ``count`` best checkpoints, the best first; of equal scores, the newer step is better. There are fewer if
    not enough checkpoints have a score.

    Args:
        after: only later steps than this are compared, because another phase has another objective, and its scores cannot be compared.
    """
    if count == 0:
        return []
    scores = {step: _score(step_path(directory, step), metric) for step in complete_steps(directory) if step > after}
    return rank_steps(scores, count, metric)


def rank_steps(scores: Mapping[int, float | None], count: int, metric: str) -> list[int]:
    """Return the ``count`` best steps by their scores of a metric, the best first. A step whose score is None, NaN or infinite is left
    out."""
    ranked = sorted((cost(metric, score), -step) for step, score in scores.items() if score is not None and _is_finite(score))
    return [-negative for _, negative in ranked[:count]]


def _is_finite(score: float) -> bool:
    """Tell whether a score is finite as a float. A manifest may hold an integer that is larger than any float."""
    return abs(score) <= sys.float_info.max


def _score(path: Path, metric: str) -> float | None:
    try:
        return read_scores(path).get(metric)
    except DamagedCheckpointError as error:
        logger.warning("%s is damaged: %s. It counts as a checkpoint without a score", error.path, error.reason)
        return None

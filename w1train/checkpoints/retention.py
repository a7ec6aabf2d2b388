"""Which checkpoints stay: the newest, every so many steps one for ever, and the best of the phase.

What stays follows from the steps and scores of all checkpoints so far, not from when it is asked: a kill between a save and the removal
changes nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.commit import remove_checkpoint
from w1train.checkpoints.manifest import CheckpointError, complete_steps, read_scores
from w1train.runtime.pulse import moved

logger = logging.getLogger(__name__)


def remove_old(
    directory: Path,
    keep: int,
    keep_best: int,
    best_metric: str,
    phase_start: int = 0,
    *,
    keep_every: int = 0,
    in_use: Collection[int] = (),
) -> None:
    """Remove what is neither among the newest nor among the best, nor kept for ever. Rank 0 only.

    Args:
        in_use: steps that are being read, and are left for the next time.
    """
    steps = complete_steps(directory)
    best = best_steps(directory, keep_best, best_metric, after=phase_start)
    for step in sorted({*steps} - kept_steps(steps, best, keep, keep_every) - {*in_use}):
        limits = f"checkpoint.keep={keep}, checkpoint.keep_every={keep_every}, checkpoint.keep_best={keep_best}"
        logger.info("removing checkpoint of step %d (%s)", step, limits)
        path = step_path(directory, step)
        try:
            remove_checkpoint(path)
            moved()
        except OSError as error:
            logger.warning("could not remove checkpoint %s: %s. Training goes on; the next start removes the rest", path, error)


def kept_steps(steps: Collection[int], best: Collection[int], keep: int, keep_every: int) -> set[int]:
    """The steps that stay.

    Args:
        steps: of all checkpoints.
        best: those among them that stay for their scores.
    """
    for_ever = {step for step in steps if keep_every > 0 and step % keep_every == 0}
    return {*sorted(steps)[-keep:], *best, *for_ever}


def best_steps(directory: Path, count: int, metric: str, *, after: int = 0) -> list[int]:
    """The steps of the ``count`` best checkpoints (fewer if there are not as many with a score), the best first; of equals the newer.

    Args:
        after: only later steps than this; of a phase, whose scores another phase's do not compare with.
    """
    if count == 0:
        return []
    return rank_steps({step: _score(step_path(directory, step), metric) for step in complete_steps(directory) if step > after}, count)


def rank_steps(scores: Mapping[int, float | None], count: int) -> list[int]:
    """The ``count`` best of steps with their scores, lower being better; a score that is None or no finite float counts as no score."""
    ranked = sorted((score, -step) for step, score in scores.items() if score is not None and _is_finite(score))
    return [-negative for _, negative in ranked[:count]]


def _is_finite(score: float) -> bool:
    """Tell whether a score is a finite float; an integer of a manifest may be larger than any."""
    return abs(score) <= sys.float_info.max


def _score(path: Path, metric: str) -> float | None:
    try:
        return read_scores(path).get(metric)
    except CheckpointError as error:
        logger.warning("%s counts as one without a score", error)
        return None

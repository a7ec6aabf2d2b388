"""The average of a phase's best checkpoints, and its comparison with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from w1train.checkpoints.averaging import average_steps
from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.loading import load_model_weights
from w1train.checkpoints.manifest import read_scores
from w1train.checkpoints.retention import best_steps
from w1train.config.schema import Config
from w1train.engine.building import TrainedModel
from w1train.records.average_comparison import compare
from w1train.runtime.distributed import on_main_rank
from w1train.runtime.pulse import LOADING, pulse
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)


def average_phase(
    config: Config, run: RunDirectory, model: TrainedModel, score: Callable[[], dict[str, Any]], *, step: int, after: int
) -> dict[str, Any] | None:
    """Average the best checkpoints later than step ``after``, and compare the average with them. Every rank calls this, right after
    ``step`` was saved: the model gets the weights of that checkpoint back.

    Args:
        score: a function that validates the model with its current weights.

    Returns:
        The record of the comparison; None if fewer than two checkpoints have a score, or the comparison was recorded before.
    """
    settings = config.checkpoint
    members = on_main_rank(partial(best_steps, run.checkpoints, settings.keep_best, settings.best_metric, after=after))
    if len(members) < 2:
        logger.warning("no average: %d checkpoints after step %d have a score, and an average needs two", len(members), after)
        return None
    path = average_steps(run.checkpoints, members)
    if on_main_rank(lambda: any(record["checkpoint"] == path.name for record in read_metrics(run.metrics, kind="average"))):
        return None
    with pulse.during(LOADING):
        load_model_weights(path, model.stages)
    validation = score()
    with pulse.during(LOADING):
        load_model_weights(step_path(run.checkpoints, step), model.stages)
    member_scores = on_main_rank(lambda: {member: read_scores(step_path(run.checkpoints, member)) for member in members})
    return compare(path.name, settings.best_metric, validation, member_scores)

"""Averages of a run's checkpoints that a command makes outside the run, on this process, and their comparison with the members."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w1train.checkpoints.averaging import average_steps
from w1train.checkpoints.checkpoint_names import step_of_name, step_path, writing_path
from w1train.checkpoints.commit import remove_unfinished
from w1train.checkpoints.manifest import complete_steps, read_progress
from w1train.checkpoints.retention import best_steps
from w1train.config.credentials import mask_urls
from w1train.config.errors import UserError
from w1train.config.phases import phase_start
from w1train.config.schema import Config
from w1train.config.serialization import config_from_yaml
from w1train.evaluation.checkpoint_validation import open_validation, require_own, validate_checkpoint
from w1train.inference.predictor import load_for_inference
from w1train.records.average_comparison import average_summary, compare
from w1train.records.summary import add_to_summary
from w1train.runtime.device import select_device
from w1train.runtime.distributed import initialize_process_group
from w1train.runtime.megatron_on_cpu import redirect_cuda_to_cpu
from w1train.runtime.output_files import require_apart
from w1train.runtime.record_files import MetricsLog, read_metrics
from w1train.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_DEFAULT_COUNT = 5


@dataclass(frozen=True, slots=True)
class AverageRequest:
    """A request for an average. Where a field is None, the run's configuration decides."""

    run: Path
    top_k: int | None
    metric: str | None
    steps: list[int] | None
    output: Path | None
    evaluate: bool
    validation: str | None = None
    """Prefix of a validation set; None = the validation set of the run."""


def average_run(request: AverageRequest) -> tuple[Path, dict[str, Any] | None]:
    """Write the average, and compare it with its members if ``request.evaluate`` is set.

    The comparison is recorded in the run if the average is in the run and the validation set is the run's.

    Returns:
        The directory of the average, and the comparison; None = no comparison was asked for.

    Raises:
        UserError: there are not enough checkpoints; the average would be written into a run that is in use; there is no validation set.
        CheckpointError: a member is damaged, or the average could not be written.
    """
    if request.output is not None and not request.output.name:
        raise UserError(f"--output is {request.output}, which names a directory that exists: the name of a new directory is needed")
    config = config_from_yaml(request.run / "config.yaml")
    if request.evaluate:
        _require_validation(request, config)
    metric = request.metric or config.checkpoint.best_metric
    redirect_cuda_to_cpu()
    initialize_process_group(select_device())
    with _claimed(request):
        steps = _members(request, config, metric)
        if request.output is not None:
            members = [step_path(request.run / "checkpoints", step) for step in steps]
            require_apart([request.output, writing_path(request.output)], members)
            if not request.output.exists():
                _require_name(request.output, max(steps))
            request.output.parent.mkdir(parents=True, exist_ok=True)
        path = average_steps(request.run / "checkpoints", steps, request.output)
        if not request.evaluate:
            return path, None
        comparison = _compare(request, path, steps, metric)
        if request.output is None and _is_own(request, config) and not _is_recorded(request.run, comparison):
            _record(request.run, config, read_progress(path).step, read_progress(path).samples, comparison)
        return path, comparison


def _require_validation(request: AverageRequest, config: Config) -> None:
    if request.validation is None and config.data.validation is None:
        raise UserError(f"{request.run} has no data.validation to compare checkpoints on: give --validation PREFIX or --no-evaluate")
    require_own(config.data, request.validation)


def _is_own(request: AverageRequest, config: Config) -> bool:
    """Tell whether the comparison is on the run's validation set. The run's configuration has its URL without the password."""
    return request.validation is None or mask_urls(request.validation) == config.data.validation


@contextlib.contextmanager
def _claimed(request: AverageRequest) -> Iterator[None]:
    """Claim the run while its directory is written to. Otherwise training could start, and remove a member or the unfinished average."""
    if request.output is not None:
        yield
        return
    directory = RunDirectory(request.run)
    directory.claim()
    try:
        remove_unfinished(directory.checkpoints)
        yield
    finally:
        directory.release()


def _members(request: AverageRequest, config: Config, metric: str) -> list[int]:
    checkpoints = request.run / "checkpoints"
    there = complete_steps(checkpoints)
    listed = ", ".join(map(str, there)) or "none"
    if request.steps is not None:
        missing = [step for step in request.steps if step not in there]
        if missing:
            raise UserError(f"{request.run} has no checkpoint of step {', '.join(map(str, missing))}; it has: {listed}")
        return request.steps
    count = request.top_k if request.top_k is not None else config.checkpoint.keep_best or _DEFAULT_COUNT
    if count < 2:
        raise UserError(f"--top-k is {count}; it must be at least 2")
    best = best_steps(checkpoints, count, metric, after=phase_start(config, there[-1]) if there else 0)
    if len(best) < 2:
        raise UserError(
            f"{request.run} has {len(best)} checkpoints with {metric} of a validation at their step (all: {listed}), and an average "
            "takes two. Set checkpoint.interval to a multiple of validation.interval, or give --steps"
        )
    if len(best) < count:
        logger.warning("only %d checkpoints are there with a score, not %d: all of them are averaged", len(best), count)
    return sorted(best)


def _require_name(output: Path, step: int) -> None:
    """Raise UserError if the output is named after another step, because training would not resume from it."""
    name = step_path(output.parent, step).name
    if step_of_name(output.name) not in (None, step):
        raise UserError(f"--output is {output}; the average is of step {step}, as its newest member: call it {name}")


def _compare(request: AverageRequest, path: Path, steps: list[int], metric: str) -> dict[str, Any]:
    """Validate the average and its members on this process, so that the same rounding applies to all of them, whatever the run's layout
    is."""
    checkpoints = request.run / "checkpoints"
    model = load_for_inference(request.run, steps[-1])
    data = open_validation(model, request.validation)
    members = {step: validate_checkpoint(model, data, step_path(checkpoints, step)) for step in steps}
    return compare(path.name, metric, validate_checkpoint(model, data, path), members)


def _is_recorded(run: Path, comparison: dict[str, Any]) -> bool:
    """Tell whether an earlier call has recorded this comparison, apart from times."""
    expected = {name: value for name, value in comparison.items() if not name.startswith("time/")}
    there = read_metrics(RunDirectory(run).metrics, kind="average")
    return any(expected.items() <= record.items() for record in there)


def _record(run: Path, config: Config, step: int, samples: int, comparison: dict[str, Any]) -> None:
    directory = RunDirectory(run)
    tokens = samples * config.data.sequence_length
    with MetricsLog(directory.metrics) as log:
        log.append({"kind": "average", "step": step, "tokens": tokens, **comparison})
    if directory.summary.is_file():
        add_to_summary(directory.path, {"average": average_summary(read_metrics(directory.metrics, kind="average"))})

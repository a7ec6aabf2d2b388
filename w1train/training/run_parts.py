"""The parts of a run, built in the order in which mistakes are found soonest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from w1train.checkpoints.manifest import Progress
from w1train.checkpoints.recovery import choose_checkpoint
from w1train.checkpoints.saver import CheckpointSaver
from w1train.config.schema import Config
from w1train.config.serialization import config_to_yaml
from w1train.data.conversations.chat_prompts import ChatPrompts, chat_prompts_of
from w1train.engine.building import LoadWeights, TrainedModel, build_trained_model
from w1train.profiling.stopwatches import communication_timer
from w1train.profiling.throughput import StepTimer, device_peak_tflops
from w1train.records.sink import RecordedRun, Sink
from w1train.records.watch import Watch
from w1train.runtime.device import device_name
from w1train.runtime.distributed import Ranks, all_or_none, on_main_rank
from w1train.runtime.kernel_choices import kernels_in_one_line
from w1train.runtime.run_directory import RunDirectory
from w1train.training.checkpoint_loader import CheckpointLoader, prepare_resume
from w1train.training.companions import build_reference
from w1train.training.health.garbage import GarbageCollection
from w1train.training.health.guard import StepGuard
from w1train.training.health.stragglers import StragglerClock
from w1train.training.inputs import choose_backends
from w1train.training.measurement import Measurement
from w1train.training.run_description import describe_run
from w1train.training.schedule_position import SchedulePosition
from w1train.training.text_inputs import keep_text_inputs
from w1train.training.training_data import TrainingData, prepare_data

type OpenWeights = Callable[[Config], LoadWeights]
"""A function that opens the weights that a run begins from. The caller gives it, because the package of conversion may import training, and
not the other way."""


@dataclass(frozen=True, slots=True)
class RunParts:
    """The parts that the training loop works with."""

    data: TrainingData
    chat: ChatPrompts | None
    model: TrainedModel
    checkpoints: CheckpointLoader
    progress: Progress
    """The progress of the run. The loop changes this object, and every part sees the changes."""
    position: SchedulePosition
    watch: Watch
    saver: CheckpointSaver
    timer: StepTimer
    guard: StepGuard
    stragglers: StragglerClock
    garbage: GarbageCollection
    measurement: Measurement


def build_parts(
    config: Config, ranks: Ranks, run: RunDirectory, open_initial_weights: OpenWeights, sinks: Sequence[type[Sink]] | None
) -> RunParts:
    """Choose the checkpoint that the run resumes from, and build all parts. Every rank calls this, after the run directory was claimed.

    Raises:
        The errors of configuration, data and checkpoint, on every rank.
    """
    with kernels_in_one_line():
        return _build(config, ranks, run, open_initial_weights, sinks)


def _build(
    config: Config, ranks: Ranks, run: RunDirectory, open_initial_weights: OpenWeights, sinks: Sequence[type[Sink]] | None
) -> RunParts:
    step = choose_checkpoint(run.checkpoints, config.checkpoint, run.events)
    on_main_rank(partial(prepare_resume, config, run, step))
    all_or_none(partial(choose_backends, config, ranks.device))
    all_or_none(partial(prepare_data, config))
    data = all_or_none(partial(TrainingData, config, ranks))
    chat = all_or_none(partial(chat_prompts_of, config, data.tokenizer))
    on_main_rank(partial(keep_text_inputs, config, run, chat))
    load = open_initial_weights(config) if step is None and config.training.initial_weights is not None else None
    model = build_trained_model(config, load)
    checkpoints = CheckpointLoader(config, run, model, data)
    progress = checkpoints.load(step)
    measurement = Measurement(build_reference(config, model, open_initial_weights, progress))
    position = SchedulePosition(config, progress)
    watch = _build_watch(config, ranks, run, data, progress, position, sinks)
    saver = _build_saver(config, run, model, watch, is_resumed=step is not None)
    timer = _build_timer(config, ranks, model)
    health = config.health
    guard = StepGuard(health, progress, model, run.bad_batches)
    stragglers = StragglerClock(model.hooks, health.straggler_interval, health.straggler_share)
    garbage = GarbageCollection(health.gc_interval)
    return RunParts(data, chat, model, checkpoints, progress, position, watch, saver, timer, guard, stragglers, garbage, measurement)


def _build_watch(
    config: Config,
    ranks: Ranks,
    run: RunDirectory,
    data: TrainingData,
    progress: Progress,
    position: SchedulePosition,
    sinks: Sequence[type[Sink]] | None,
) -> Watch:
    description = describe_run(config, ranks, run, data, progress, position)
    recorded = RecordedRun(config, run, progress.step, position.num_steps, position.num_tokens, description)
    return all_or_none(partial(Watch, recorded, ranks, progress, sinks))


def _build_saver(config: Config, run: RunDirectory, model: TrainedModel, watch: Watch, *, is_resumed: bool) -> CheckpointSaver:
    return CheckpointSaver(
        run.checkpoints,
        model,
        config.checkpoint,
        config_to_yaml(config),
        before_commit=watch.sync,
        after_commit=lambda saved_step, seconds: watch.event("checkpoint", step=saved_step, seconds=seconds),
        is_resumed=is_resumed,
        # This is less than the time after which the watchdog would call it a hang and end the run.
        upload_patience=config.health.hang_timeout / 2,
    )


def _build_timer(config: Config, ranks: Ranks, model: TrainedModel) -> StepTimer:
    peak = config.logging.peak_tflops or device_peak_tflops(device_name(ranks.device))
    communication = communication_timer(model.hooks, ranks.device).take if config.logging.communication else None
    return StepTimer(ranks.world_size, peak, communication=communication)

"""The training loop. Read ``Trainer.fit`` first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from w1train.checkpoints.averaging import average_steps
from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.loading import load_checkpoint, load_model_weights
from w1train.checkpoints.manifest import Progress, read_progress, read_scores
from w1train.checkpoints.recovery import choose_checkpoint, newest_good_step, set_aside_damaged
from w1train.checkpoints.retention import best_steps
from w1train.checkpoints.saver import CheckpointSaver
from w1train.checkpoints.verification import read_config
from w1train.config.errors import UserError, raise_if_any
from w1train.config.phases import phase_ends, phase_start, stage_of_step
from w1train.config.resume import check_resume
from w1train.config.schedule import learning_rate, num_steps, stage_at, total_tokens
from w1train.config.schema import Config
from w1train.config.serialization import config_differences, config_to_yaml
from w1train.config.stages import at_stage
from w1train.data.dataset import DatasetError
from w1train.diffusion.corruption import NoisyBatch, corrupt
from w1train.engine.building import LoadWeights, build_trained_model
from w1train.engine.gradients import prepare_gradients, step_with_prepared_gradients
from w1train.inference.predictor import Predictor, block_predictor
from w1train.model.flops import model_flops, num_parameters
from w1train.objectives.description import block_size, describe_objective
from w1train.profiling.profiler import Profiler
from w1train.profiling.stopwatches import communication_timer
from w1train.profiling.throughput import StepTimer, device_peak_tflops
from w1train.records.average_comparison import average_summary, compare
from w1train.records.summary import read_steps, tokens_per_second, validation_summary, write_summary
from w1train.records.watch import Watch, require_finite
from w1train.runtime.device import device_name, memory_gib
from w1train.runtime.distributed import Ranks, agreed, all_or_none, on_main_rank
from w1train.runtime.files import copy_if_different, write_text
from w1train.runtime.pulse import LOADING, SAVING, TRAINING, VALIDATING, pulse
from w1train.runtime.ranges import step_part
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory
from w1train.sampling.text import sample_texts
from w1train.training.agreement import Agreement
from w1train.training.forward import StepWork, run_micro_batches
from w1train.training.health.bad_batches import keep
from w1train.training.health.garbage import GarbageCollection
from w1train.training.health.guard import ComputedStep, StepGuard
from w1train.training.health.stragglers import StragglerClock
from w1train.training.inputs import choose_backends
from w1train.training.training_data import TrainingData, prepare_data
from w1train.training.validation import scores, validate

logger = logging.getLogger(__name__)


class Trainer:
    """One run, from its first step or from its newest checkpoint, to its last step."""

    def __init__(self, config: Config, ranks: Ranks, run: RunDirectory, open_initial_weights: Callable[[Config], LoadWeights]) -> None:
        """The run directory is claimed. Raises what configuration, data and checkpoint raise, on every rank.

        ``open_initial_weights`` is called if the run begins from other weights (handed in, for conversion is built on training).
        """
        self.config, self.ranks, self.run = config, ranks, run
        self.num_steps = num_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
        step = choose_checkpoint(run.checkpoints, config.checkpoint, run.events)
        on_main_rank(partial(prepare_resume, config, run, step))
        all_or_none(partial(choose_backends, config, ranks.device))
        all_or_none(partial(prepare_data, config))
        self.data = all_or_none(partial(TrainingData, config, ranks))
        on_main_rank(partial(copy_if_different, config.data.tokenizer, run.tokenizer))
        load = open_initial_weights(config) if step is None and config.training.initial_weights is not None else None
        self.model = build_trained_model(config, load)
        self.progress = self._load_progress(step)
        self.scores: dict[str, float] = {}
        self.scored_step = -1
        self.watch = Watch(config, ranks, run, self.progress, self.num_steps, total_tokens(config.schedule))
        self.saver = CheckpointSaver(
            run.checkpoints,
            self.model,
            config.checkpoint,
            config_to_yaml(config),
            before_commit=self.watch.sync,
            after_commit=lambda saved_step, seconds: self.watch.event("checkpoint", step=saved_step, seconds=seconds),
            is_resumed=step is not None,
            # Less than what the watchdog takes for a hang, which would end the run.
            upload_patience=config.health.hang_timeout / 2,
        )
        peak = config.logging.peak_tflops or device_peak_tflops(device_name(ranks.device))
        communication = communication_timer(self.model.hooks, ranks.device).take if config.logging.communication else None
        self.timer = StepTimer(ranks.world_size, peak, communication=communication)
        self.profiler = Profiler(config.profiling, ranks, run.profile)
        self.phase_ends = phase_ends(config)
        self.stage_name = stage_of_step(config, self.progress.step)
        self.stage = at_stage(config, self.stage_name)
        logger.info("stage %s: %s", self.stage_name, describe_objective(self.stage))
        health = config.health
        self.guard = StepGuard(health, self.progress, self.model, run.bad_batches)
        self.stragglers = StragglerClock(self.model.hooks, health.straggler_interval, health.straggler_share)
        self.garbage = GarbageCollection(health.gc_interval)
        self.num_rewinds = 0
        self.stopped = False
        """Whether a signal has ended training before its last step, after a checkpoint."""

    def fit(self) -> None:
        """Train to the end of the schedule, or to the step at which a signal asks for the end.

        Raises:
            CheckpointError, FloatingPointError: on every rank.
            DatasetError: on the rank whose samples are damaged.
            OSError: on rank 0, which writes the records.
        """
        # Killed between the last checkpoint and the summary, it has things to do.
        if self.progress.step >= self.num_steps and on_main_rank(partial(read_steps, self.run.summary)) == self.progress.step:
            logger.info("%s has all its %d steps: nothing to do", self.run.path, self.num_steps)
            return
        self.started = time.perf_counter() - self.progress.seconds
        pulse.num_steps, pulse.total_tokens = self.num_steps, total_tokens(self.config.schedule)
        self._tell_progress()
        with self.watch, self.data.loader, self.saver, self.profiler, self.garbage:
            self._print_header()
            pulse.activity = TRAINING
            pulse.beat()
            if self.progress.step == 0:
                self.validate()
            elif self.progress.step in self.phase_ends:
                # Killed between the phase's last save and what follows it.
                self.end_phase()
            batches = self.noisy_batches()
            while self.progress.step < self.num_steps and not self.stopped:
                try:
                    self.profiler.step_begins(self.progress.step + 1, self.timer)
                    self.train_step(batches)
                    self.after_step(self.agreement.wait())
                except FloatingPointError as error:
                    batches.close()
                    self.rewind(error)
                    batches = self.noisy_batches()
            if self.stopped:
                # Not for its upload: the time until the end by force is short, and the next start goes on from here.
                self.saver.require_saved()
            else:
                self.saver.close()
                self.progress.seconds = time.perf_counter() - self.started
                self.summarize()

    def after_step(self, stop_requested: bool) -> None:
        """What is due at the boundary between two steps."""
        self.garbage.step_done(self.progress.step)
        self.saver.poll()
        if self.is_due(self.config.validation.interval):
            self.validate()
        if self.is_due(self.config.sampling.interval):
            self.sample()
        self.stopped = stop_requested and self.progress.step < self.num_steps
        # Also where it is stopped at: what the resumed run does next is the next step.
        if self.is_due(self.config.checkpoint.interval) or self.stopped:
            with pulse.during(SAVING):
                self.save()
        if self.progress.step in self.phase_ends:
            self.end_phase()
        if self.stopped:
            logger.info("stopped by a signal at step %d; the same command goes on from there", self.progress.step)

    def rewind(self, error: FloatingPointError) -> None:
        """Go back to the newest checkpoint, in the hope that what the run met there was the machine's fault.

        Raises:
            FloatingPointError: ``error``, if there is no checkpoint or the run may not go back (any more).
        """
        self.saver.wait()
        with pulse.during(LOADING):
            self._go_back(error)
        self.timer.restart()

    def _go_back(self, error: FloatingPointError) -> None:
        health = self.config.health
        step = newest_good_step(self.run.checkpoints, hashes=self.config.checkpoint.verify)
        if health.on_nonfinite == "stop" or step is None or self.num_rewinds >= health.max_rewinds:
            raise error
        self.num_rewinds += 1
        logger.warning("%s. Going back to the checkpoint of step %d (%d of %d times)", error, step, self.num_rewinds, health.max_rewinds)
        # A damaged one that is later would count among the newest, and good ones be removed for it.
        on_main_rank(partial(set_aside_damaged, self.run.checkpoints, step))
        self.model.gather_parameters()
        progress = self._load_progress(step)
        # In place: what counts the run's steps elsewhere counts with this one.
        for field in fields(Progress):
            setattr(self.progress, field.name, getattr(progress, field.name))
        self.started = time.perf_counter() - self.progress.seconds
        self.scored_step = -1
        self.watch.go_back()

    def is_due(self, interval: int) -> bool:
        """Every ``interval`` steps and at the end of each phase; 0 = never."""
        return interval > 0 and (self.progress.step % interval == 0 or self.progress.step in self.phase_ends)

    def enter_stage(self) -> None:
        """Set what holds for the step that begins now: the configuration of its stage, and how far its annealing is."""
        tokens = self.progress.samples * self.config.data.sequence_length
        name, fraction = stage_at(self.config.schedule, tokens + 1)
        if name != self.stage_name:
            self.stage_name, self.stage = name, at_stage(self.config, name)
            logger.info("stage %s: %s", name, describe_objective(self.stage))
        annealing_tokens = self.stage.diffusion.annealing_tokens
        self.annealed = min(1.0, fraction * self.config.schedule.stages[name].tokens / annealing_tokens) if annealing_tokens else 1.0

    def noisy_batches(self) -> Generator[NoisyBatch]:
        """This rank's corrupted micro-batches from where the run is."""
        batches = self.data.loader.micro_batches(self.progress.samples)
        while True:
            with self.timer.waiting_for_data():
                batch = next(batches)
            # At the step that asks for it, so with that step's objective.
            noisy = corrupt(batch, self.stage.diffusion, self.config.training.seed)
            noisy.annealed = self.annealed
            yield noisy

    def train_step(self, batches: Iterator[NoisyBatch]) -> None:
        """One optimizer step on one global batch, if its loss and gradients are good.

        Raises:
            FloatingPointError: on every rank; they are not, and the run cannot go on without the batch.
        """
        self.enter_stage()
        self.stragglers.begin(self.progress.step + 1)
        computed = self.compute_step(batches)
        is_good = self.guard.checked(computed, self.compute_step_again, self.stage_name)
        self.agreement = Agreement(pulse.stop_requested)
        if is_good:
            step_with_prepared_gradients(self.model.optimizer, computed.grad_norm)
        num_samples = self.stage.training.global_batch_size
        self.progress.step += 1
        self.progress.samples += num_samples
        self._tell_progress()
        self.record_step(computed.values, num_samples * self.config.data.sequence_length, computed.work)

    def compute_step(self, batches: Iterator[NoisyBatch]) -> ComputedStep:
        """Loss and gradients of one global batch, ready for the optimizer."""
        training, model = self.stage.training, self.model
        num_samples = training.global_batch_size
        rate = learning_rate(self.config.schedule, (self.progress.samples + num_samples) * self.config.data.sequence_length)
        model.zero_gradients()
        self.guard.local_gradients.begin()
        num_micro_batches = num_samples // (training.micro_batch_size * self.ranks.data_parallel_size)
        metrics, work = run_micro_batches(self.stage, model.chunks, batches, num_micro_batches, training=True)
        for group in model.optimizer.param_groups:
            group["lr"] = rate * group["lr_mult"]
        grad_norm = prepare_gradients(model.optimizer)
        values = {**metrics, "grad_norm": float(grad_norm), "learning_rate": rate, "batch_size": num_samples}
        if self.config.parallel.context > 1:
            values["context_balance"] = work.context_balance
        return ComputedStep(values, grad_norm, self.guard.local_gradients.are_finite(), work)

    def compute_step_again(self, kept: list[NoisyBatch]) -> ComputedStep:
        """The step that has just been computed, from the same batch, which is added to ``kept``. The run's own batches stand behind it."""
        batches = self.noisy_batches()
        computed = self.compute_step(keep(batches, kept))
        batches.close()
        return computed

    def record_step(self, values: dict[str, Any], num_tokens: int, work: StepWork) -> None:
        """Add what follows from the step's values, and its times."""
        flops = model_flops(
            self.config.model,
            num_tokens=work.num_positions,
            visible_pairs=work.visible_pairs,
            num_logits=work.num_logits,
            num_segments=work.num_segments,
        )
        times = self.timer.finish(num_tokens, flops.total)
        self.watch.record(
            "train",
            {
                **values,
                "elbo_bits_per_byte": self.data.bits_per_byte(values["elbo"], self.progress.samples),
                "epoch": self.data.samples.epoch(self.progress.samples),
                **self.data.corpus_metrics(self.progress.samples),
                **self.where(),
                **times,
                "health/skipped_steps": self.guard.num_skipped,
                **self.stragglers.metrics,
                **self.saver.step_times(times),
                "time/memory_gib": memory_gib(self.ranks.device),
            },
        )

    @step_part("validate")
    def validate(self) -> None:
        """Score the validation set, if there is one."""
        if self.data.validation is not None:
            self.model.gather_parameters()
            with pulse.during(VALIDATING):
                record = {**validate(self.stage, self.model, self.data), **self.where()}
            self.watch.record("validation", record)
            self.scores = scores(record)
            self.scored_step = self.progress.step
        self.timer.restart()

    def where(self) -> dict[str, Any]:
        """Stage and block size, for the records."""
        return {"stage": self.stage_name, "block_size": block_size(self.stage)}

    @step_part("sample")
    def sample(self) -> None:
        """Complete the prompts, on the first model replica."""
        # On all ranks, though only some sample.
        self.model.gather_parameters()
        if self.stage.diffusion.objective == "autoregressive":
            logger.info("no samples at step %d: an autoregressive stage has not seen a mask token", self.progress.step)
        elif self.ranks.data_parallel_rank == 0:
            predictor = Predictor(self.stage, list(self.model.chunks))
            with predictor.evaluating():
                model = block_predictor(predictor) or predictor
                samples = sample_texts(model, self.data.tokenizer, self.config.sampling.prompts, self.stage, device=self.ranks.device)
            self.watch.record_samples([(sample.prompt, sample.text) for sample in samples])
        self.timer.restart()

    @step_part("save")
    def save(self) -> None:
        """Begin to write a checkpoint; ``self.saver`` says when it is there."""
        with self.saver.times.stalling():
            self.model.gather_parameters()
            # The loss of this step was finite before its update; the next one will not be if the update was not.
            require_finite(self.progress.step, {"the largest parameter": self.model.largest_parameter()})
            self.progress.seconds = time.perf_counter() - self.started
            self.progress.dataset = self.data.fingerprint(self.progress.samples)
            self.saver.save(
                self.progress,
                phase_start=phase_start(self.config, self.progress.step),
                scores=self.scores if self.scored_step == self.progress.step else None,
            )
        self.timer.restart()

    def end_phase(self) -> None:
        """After the last step of a phase was saved: keep its best checkpoints alone, and average them if that is asked for."""
        settings = self.config.checkpoint
        after = phase_start(self.config, self.progress.step)
        if settings.average_at_end or self.progress.step >= self.num_steps:
            self.saver.require_saved()
        self.saver.wait()
        # Again, for a run that was killed between the save and this.
        on_main_rank(partial(self.saver.remove_old, after))
        if settings.average_at_end:
            self.average(after)

    def average(self, after: int) -> None:
        """Average the best checkpoints later than step ``after``, once, and say whether that is better than they are.

        Right after the present step was saved: the weights it was saved with are the ones that training goes on with.
        """
        checkpoints, settings = self.run.checkpoints, self.config.checkpoint
        members = on_main_rank(partial(best_steps, checkpoints, settings.keep_best, settings.best_metric, after=after))
        if len(members) < 2:
            logger.warning("no average: %d checkpoints after step %d have a score, and it takes two", len(members), after)
            return
        path = average_steps(checkpoints, members)
        if on_main_rank(lambda: any(record["checkpoint"] == path.name for record in read_metrics(self.run.metrics, kind="average"))):
            return
        with pulse.during(LOADING):
            load_model_weights(path, self.model.stages)
        validation = {**validate(self.stage, self.model, self.data), **self.where()}
        with pulse.during(LOADING):
            load_model_weights(step_path(checkpoints, self.progress.step), self.model.stages)
        member_scores = on_main_rank(lambda: {step: read_scores(step_path(checkpoints, step)) for step in members})
        self.watch.record("average", compare(path.name, settings.best_metric, validation, member_scores))
        self.timer.restart()

    def summarize(self) -> None:
        """Write summary.json, from what is recorded: the times are those of the whole run, however often it was resumed."""
        if not self.ranks.is_main:
            return
        steps = read_metrics(self.run.metrics, kind="train")
        write_summary(
            self.run.path,
            {
                "name": self.config.name,
                "num_parameters": num_parameters(self.config.model),
                "world_size": self.ranks.world_size,
                "device": device_name(self.ranks.device),
                "steps": self.progress.step,
                "tokens_seen": self.progress.samples * self.config.data.sequence_length,
                "tokens_per_second": tokens_per_second(steps, self.config.data.sequence_length),
                "wall_seconds": self.progress.seconds,
                "validation": validation_summary(read_metrics(self.run.metrics, kind="validation")),
                "average": average_summary(read_metrics(self.run.metrics, kind="average")),
                "unigram_bits_per_byte": self.data.validation_unigram_bits_per_byte,
            },
        )

    def _tell_progress(self) -> None:
        """To those who look from outside."""
        pulse.step, pulse.tokens = self.progress.step, self.progress.samples * self.config.data.sequence_length

    def _load_progress(self, step: int | None) -> Progress:
        if step is None:
            return Progress()
        path = step_path(self.run.checkpoints, step)
        logger.info("resuming from %s", path)
        # It was verified when it was chosen.
        progress = load_checkpoint(path, self.model, verify=False)
        if progress.step != step:
            name = step_path(self.run.checkpoints, progress.step).name
            raise agreed(UserError(f"{path} is a checkpoint of step {progress.step}, by its manifest: rename it to {name}"))
        all_or_none(partial(self._require_dataset, progress, path))
        return progress

    def _require_dataset(self, progress: Progress, path: Path) -> None:
        fingerprint = self.data.fingerprint(progress.samples)
        if progress.dataset != fingerprint:
            datasets = " or ".join(self.data.train)
            raise DatasetError(
                f"dataset {datasets} has changed since {path} was saved: the SHA-256 of its tokens is "
                f"{fingerprint}, it was {progress.dataset}. Bring the old data back, or start a run of another name"
            )

    def _print_header(self) -> None:
        config, ranks = self.config, self.ranks
        parallel = config.parallel
        layout = f"data {ranks.data_parallel_size}, tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}"
        self.watch.console.print_header(
            config.name,
            {
                "model": f"{num_parameters(config.model):,} parameters",
                "device": f"{ranks.world_size} x {device_name(ranks.device)}, {config.training.precision} ({layout})",
                "data": f"{self.data.num_tokens:,} tokens, {config.data.sequence_length} per sample",
                "batch": f"{config.training.global_batch_size} samples of {config.data.sequence_length} tokens",
                "steps": f"{self.progress.step} of {self.num_steps} done",
                "run directory": str(self.run.path),
            },
        )


def prepare_resume(config: Config, run: RunDirectory, step: int | None) -> None:
    """On rank 0, before anything is built: compare with the configuration of the checkpoint of ``step``, write the new one.

    Raises:
        ConfigurationError: a value differs that must not change between the checkpoint and the resumed run.
        CheckpointError: the configuration is not what it was when it was saved.
    """
    if step is not None:
        checkpoint = step_path(run.checkpoints, step)
        old = read_config(checkpoint)
        progress = read_progress(checkpoint)
        tokens = progress.samples * old.data.sequence_length
        raise_if_any(check_resume(old, config, tokens, data_are_hashed=progress.dataset is not None))
        for change in config_differences(old, config):
            logger.info("configuration changed on resume: %s: %s -> %s", change.key, change.old, change.new)
    write_text(run.config, config_to_yaml(config))

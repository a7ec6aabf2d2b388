"""The training loop. Read ``Trainer.fit`` first."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from w1train.config.schema import Config
from w1train.diffusion.corruption import NoisyBatch, corrupt
from w1train.engine.gradients import prepare_gradients, step_with_prepared_gradients
from w1train.profiling.profiler import Profiler
from w1train.records.sink import Sink
from w1train.runtime.device import memory_gib
from w1train.runtime.distributed import Ranks, on_main_rank
from w1train.runtime.pulse import LOADING, SAVING, TRAINING, VALIDATING, pulse
from w1train.runtime.ranges import step_part
from w1train.runtime.run_directory import RunDirectory
from w1train.training.agreement import Agreement
from w1train.training.forward import StepWork, run_micro_batches
from w1train.training.health.bad_batches import keep
from w1train.training.health.guard import ComputedStep
from w1train.training.phase_average import average_phase
from w1train.training.run_parts import OpenWeights, build_parts
from w1train.training.run_records import is_summarized, step_flops, summarize
from w1train.training.text_samples import complete_prompts, takes_part
from w1train.training.validation import scores, validate

logger = logging.getLogger(__name__)


class Trainer:
    """One run, from its first step or from its newest checkpoint, to its last step."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        run: RunDirectory,
        open_initial_weights: OpenWeights,
        sinks: Sequence[type[Sink]] | None = None,
    ) -> None:
        """Build the run, whose directory must be claimed. Errors of the configuration, the data and the checkpoint are raised on every
        rank.

        ``open_initial_weights`` is called if the run begins from other weights. ``sinks`` get the records, if the configuration wants
        them; None = all sinks.
        """
        self.config, self.ranks, self.run = config, ranks, run
        parts = build_parts(config, ranks, run, open_initial_weights, sinks)
        self.data, self.chat, self.model, self.checkpoints = parts.data, parts.chat, parts.model, parts.checkpoints
        self.progress, self.position = parts.progress, parts.position
        self.watch, self.saver, self.timer, self.measurement = parts.watch, parts.saver, parts.timer, parts.measurement
        self.guard, self.stragglers, self.garbage = parts.guard, parts.stragglers, parts.garbage
        self.profiler = Profiler(config.profiling, ranks, run.profile)
        self.scores: dict[str, float] = {}
        """The newest validation."""
        self.scored_step = -1
        """The step of the newest validation."""
        self.stopped = False
        """This flag tells whether training has ended before its last step, after a checkpoint: by a signal, or at the step that the caller
        of ``fit`` has set."""
        self.stop_signal = 0
        """The number of this signal; 0 = no signal."""
        self._max_steps: int | None = None
        self.noise_rates: Tensor | None = None
        """The learned rates of noise of the step under way, [vocabulary]; None if the model learns none."""

    def fit(self, max_steps: int | None = None) -> None:
        """Train to the end of the schedule, to the step ``max_steps``, or to the step at which a signal asks for the end.

        Raises:
            CheckpointError, FloatingPointError: on every rank.
            DatasetError: on the rank whose samples are damaged.
            OSError: on rank 0, which writes the records.
        """
        pulse.num_steps, pulse.total_tokens = self.position.num_steps, self.position.num_tokens
        self._publish_progress()
        pulse.beat()
        # A run that was killed between its last checkpoint and its summary still has to write the summary.
        if self.position.is_over and on_main_rank(partial(is_summarized, self.run, self.progress)):
            logger.info("%s has all its %d steps: nothing to do", self.run.path, self.position.num_steps)
            return
        self._max_steps = max_steps
        if self.is_at(max_steps) and not self.position.is_over:
            logger.info("%s is at step %d already, and --max-steps is %d: nothing to do", self.run.path, self.progress.step, max_steps)
            self.stopped = True
            return
        self.started = time.perf_counter() - self.progress.seconds
        with self.watch, self.data.loader, self.saver, self.profiler, self.garbage:
            pulse.activity, pulse.can_stop = TRAINING, True
            pulse.beat()
            if self.progress.step == 0:
                self.validate()
            elif self.position.is_phase_end:
                # The run may have been killed between the phase's last save and what follows that save.
                self.end_phase()
            batches = self.noisy_batches()
            while not self.position.is_over and not self.stopped:
                try:
                    self.profiler.step_begins(self.progress.step + 1, self.timer)
                    self.train_step(batches)
                    self.after_step(self.agreement.wait())
                except FloatingPointError as error:
                    batches.close()
                    self.rewind(error)
                    batches = self.noisy_batches()
            if self.stopped:
                # This does not wait for the upload, because the run must stop soon. The next start uploads the checkpoint.
                self.saver.require_saved()
            else:
                self.saver.close()
                self.measurement.require_unchanged_reference()
                self.progress.seconds = time.perf_counter() - self.started
                self.summarize()

    @property
    def is_paused(self) -> bool:
        """Tell whether the run has ended at the step ``max_steps``, before the end of its schedule and without a signal."""
        return self.stopped and self.stop_signal == 0

    def is_at(self, max_steps: int | None) -> bool:
        """Tell whether the run has reached the step ``max_steps``; None: no such step is set."""
        return max_steps is not None and self.progress.step >= max_steps

    def train_step(self, batches: Iterator[NoisyBatch]) -> None:
        """Make one optimizer step on one global batch, if its loss and gradients are good.

        Raises:
            FloatingPointError: on every rank; loss or gradients are bad, and the run cannot continue without the batch.
        """
        self.position.enter_stage()
        self.stragglers.begin(self.progress.step + 1)
        computed = self.compute_step(batches)
        is_good = self.guard.checked(computed, self.compute_step_again, self.position.stage_name)
        self.agreement = Agreement(pulse.stop_signal)
        if is_good:
            step_with_prepared_gradients(self.model.optimizer, computed.grad_norm)
            self.model.expert_balance.move_bias()
        num_samples = self.position.stage.training.global_batch_size
        self.progress.step += 1
        self.progress.samples += num_samples
        self._publish_progress()
        self.record_step(computed.values, num_samples * self.config.data.sequence_length, computed.work)

    def compute_step(self, batches: Iterator[NoisyBatch]) -> ComputedStep:
        """Compute loss and gradients of one global batch, ready for the optimizer."""
        stage, model, rate = self.position.stage, self.model, self.position.learning_rate
        num_samples = stage.training.global_batch_size
        model.zero_gradients()
        self.guard.local_gradients.begin()
        self.noise_rates = model.noise_rates()
        num_micro_batches = num_samples // (stage.training.micro_batch_size * self.ranks.data_parallel_size)
        batches = self.measurement.before_step(stage, model.chunks, batches, num_micro_batches)
        metrics, work = run_micro_batches(stage, model.chunks, batches, num_micro_batches, training=True)
        balance = model.expert_balance.gather()
        for group in model.optimizer.param_groups:
            group["lr"] = rate * group["lr_mult"]
        grad_norm = prepare_gradients(model.optimizer)
        values = {**metrics, "grad_norm": float(grad_norm), "learning_rate": rate, "batch_size": num_samples}
        values |= balance
        if self.config.parallel.context > 1:
            values["context_balance"] = work.context_balance
        return ComputedStep(values, grad_norm, self.guard.local_gradients.are_finite(), work)

    def compute_step_again(self, kept: list[NoisyBatch]) -> ComputedStep:
        """Compute the step that has just been computed, from the same batch, whose micro-batches are added to ``kept``. The iterator of the
        run is past this batch, so a second iterator begins at the batch."""
        batches = self.noisy_batches()
        computed = self.compute_step(keep(batches, kept))
        batches.close()
        return computed

    def noisy_batches(self) -> Generator[NoisyBatch]:
        """Yield this rank's corrupted micro-batches, from the run's current step on."""
        batches = self.data.loader.micro_batches(self.progress.samples)
        while True:
            with self.timer.waiting_for_data():
                batch = next(batches)
            # The stage of the batch, and with it the objective, is known only when the step asks for the batch.
            noisy = corrupt(batch, self.position.stage.diffusion, self.config.training.seed, rates=self.noise_rates)
            noisy.annealed, noisy.first_sample = self.position.annealed, self.progress.samples
            yield noisy

    def record_step(self, values: dict[str, Any], num_tokens: int, work: StepWork) -> None:
        """Record the step's values, numbers that follow from them, and the step's times."""
        times = self.timer.finish(num_tokens, step_flops(self.position.stage, work))
        record = {
            **values,
            **self.data.step_metrics(values["elbo"], self.progress.samples),
            **(self.model.expert_balance.details() if self.position.is_due(self.config.validation.interval) else {}),
            **self.position.names(),
            **times,
            "health/skipped_steps": self.guard.num_skipped,
            **self.stragglers.metrics,
            **self.saver.step_times(times),
            "time/memory_gib": memory_gib(self.ranks.device),
        }
        self.watch.record("train", record)

    def after_step(self, stop_signal: int) -> None:
        """Do what is due at the boundary between two steps; ``stop_signal``: the number of a signal that asks for the end, or 0."""
        self.garbage.step_done(self.progress.step)
        self.saver.poll()
        if self.position.is_due(self.config.validation.interval):
            self.validate()
        if self.position.is_due(self.config.sampling.interval):
            self.sample()
        self.stop_signal = 0 if self.position.is_over else stop_signal
        self.stopped = (self.stop_signal != 0 or self.is_at(self._max_steps)) and not self.position.is_over
        # A run that is stopped here is resumed with the next step.
        if self.position.is_due(self.config.checkpoint.interval) or self.stopped:
            with pulse.during(SAVING):
                self.save()
        if self.position.is_phase_end:
            self.end_phase()

    @step_part("validate")
    def validate(self) -> None:
        """Score the validation set, if there is one."""
        if self.data.validation is not None:
            self.model.gather_parameters()
            with pulse.during(VALIDATING):
                record = self.score()
            self.watch.record("validation", record)
            self.scores = scores(record)
            self.scored_step = self.progress.step
        self.timer.restart()

    def score(self) -> dict[str, Any]:
        """Score the validation set, and return the record of it."""
        return {**validate(self.position.stage, self.model, self.data, self.measurement.reference), **self.position.names()}

    @step_part("sample")
    def sample(self) -> None:
        """Complete the prompts, on the first model replica, or on all replicas if ranks share experts."""
        # This is a collective of all ranks, although only some of them sample.
        self.model.gather_parameters()
        if takes_part(self.config, self.ranks):
            samples = complete_prompts(self.position.stage, self.model, self.data.tokenizer, self.ranks.device, self.chat)
            self.watch.record_samples(samples)
        self.timer.restart()

    @step_part("save")
    def save(self) -> None:
        """Begin to write a checkpoint. ``self.saver`` tells when it is complete."""
        with self.saver.times.stalling():
            self.model.gather_parameters()
            # The loss of this step was finite before the update. If the update was not finite, the next loss will not be finite.
            self.guard.require_finite_parameters()
            self.progress.seconds = time.perf_counter() - self.started
            self.progress.dataset = self.data.fingerprint(self.progress.samples)
            self.progress.noise = self.position.noise_fingerprint
            self.saver.save(
                self.progress,
                phase_start=self.position.phase_start,
                scores=self.scores if self.scored_step == self.progress.step else None,
            )
        self.timer.restart()

    def end_phase(self) -> None:
        """Remove all checkpoints of a phase except the best, and average the best checkpoints if the configuration asks for it. The phase's
        last step was saved before."""
        settings, after = self.config.checkpoint, self.position.phase_start
        if settings.average_at_end or self.position.is_over:
            self.saver.require_saved()
        self.saver.wait()
        # The save has removed them, unless the run was killed between the save and its end.
        on_main_rank(partial(self.saver.remove_old, after))
        if settings.average_at_end:
            comparison = average_phase(self.config, self.run, self.model, self.score, step=self.progress.step, after=after)
            if comparison is not None:
                self.watch.record("average", comparison)
                self.timer.restart()

    def rewind(self, error: FloatingPointError) -> None:
        """Go back to the newest checkpoint, in the hope that a fault of the machine was the cause of ``error``.

        Raises:
            FloatingPointError: ``error``, if there is no checkpoint, or the run may not go back any more.
        """
        self.saver.wait()
        with pulse.during(LOADING):
            self.checkpoints.go_back(self.progress, error)
            self.started = time.perf_counter() - self.progress.seconds
            self.scored_step = -1
            self.watch.go_back()
        self.timer.restart()

    def summarize(self) -> None:
        """Write summary.json."""
        if self.ranks.is_main:
            summarize(self.config, self.ranks, self.run, self.data, self.progress)

    def _publish_progress(self) -> None:
        """Publish step and token counts for status.json."""
        pulse.step, pulse.tokens = self.progress.step, self.progress.samples * self.config.data.sequence_length

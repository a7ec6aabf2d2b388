"""The summary of a run, and the FLOPs of its steps."""

from __future__ import annotations

from w1train.checkpoints.manifest import Progress
from w1train.config.phases import stage_of_step
from w1train.config.schema import Config
from w1train.config.stages import at_stage
from w1train.diffusion.processes import noise_process
from w1train.model.flops import model_flops, num_active_parameters, num_parameters
from w1train.objectives.description import block_size, num_measuring_passes
from w1train.objectives.integral import is_exact_at_the_end
from w1train.records.average_comparison import average_summary
from w1train.records.summary import read_steps, tokens_per_second, validation_summary, write_summary
from w1train.runtime.device import device_name
from w1train.runtime.distributed import Ranks
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory
from w1train.training.forward import StepWork
from w1train.training.training_data import TrainingData


def step_flops(config: Config, work: StepWork) -> float:
    """Return the FLOPs of a step, by all ranks."""
    return model_flops(
        config.model,
        num_tokens=work.num_positions,
        visible_pairs=work.visible_pairs,
        num_logits=work.num_logits,
        num_segments=work.num_segments,
        adapters=config.adapters,
        num_measuring_passes=num_measuring_passes(config),
    ).total


def describe_bound(config: Config) -> str | None:
    """Say in words what the bits per byte of a stage's validation bound. None for a run without validation."""
    if config.data.validation is None:
        return None
    size, length = block_size(config), config.data.sequence_length
    bits = f"-log2 p(text) per byte of held-out text, in samples of {length} tokens that see no text before them"
    if size == 1 and is_exact_at_the_end(config.diffusion):
        return f"exactly {bits}, where p writes one token after the other"
    canvas = "all tokens of a sample together" if size == length else f"blocks of {size} tokens from left to right"
    draw = "draw of noise" if noise_process(config.diffusion).predicts_every_token else "mask"
    noise = f"{len(config.validation.timesteps)} noise levels with one {draw} each"
    return f"an estimate, from {noise}, of an upper bound (ELBO) on {bits}, where p denoises {canvas}"


def is_summarized(run: RunDirectory, progress: Progress) -> bool:
    """Return whether summary.json exists, and has as many steps as are done. Only rank 0 calls this.

    Raises:
        UserError: the file is not a summary.
    """
    return read_steps(run.summary) == progress.step


def summarize(config: Config, ranks: Ranks, run: RunDirectory, data: TrainingData, progress: Progress) -> None:
    """Write summary.json, from the run's records: its times are those of the whole run, however often the run was resumed. Only rank 0
    calls this."""
    steps = read_metrics(run.metrics, kind="train")
    write_summary(
        run.path,
        {
            "name": config.name,
            "num_parameters": num_parameters(config.model, config.adapters),
            "num_active_parameters": num_active_parameters(config.model, config.adapters),
            "world_size": ranks.world_size,
            "device": device_name(ranks.device),
            "steps": progress.step,
            "tokens_seen": progress.samples * config.data.sequence_length,
            "tokens_per_second": tokens_per_second(steps),
            "wall_seconds": progress.seconds,
            "validation": validation_summary(read_metrics(run.metrics, kind="validation")),
            "validation_bound": describe_bound(at_stage(config, stage_of_step(config, progress.step))),
            "average": average_summary(read_metrics(run.metrics, kind="average")),
            "unigram_bits_per_byte": data.validation_unigram_bits_per_byte,
        },
    )

"""The summary of a run, and the FLOPs of its steps."""

from __future__ import annotations

from w1train.checkpoints.manifest import Progress
from w1train.config.schema import Config, ModelConfig
from w1train.model.flops import model_flops, num_parameters
from w1train.records.average_comparison import average_summary
from w1train.records.summary import read_steps, tokens_per_second, validation_summary, write_summary
from w1train.runtime.device import device_name
from w1train.runtime.distributed import Ranks
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory
from w1train.training.forward import StepWork
from w1train.training.training_data import TrainingData


def step_flops(model: ModelConfig, work: StepWork) -> float:
    """Return the FLOPs of a step, by all ranks."""
    return model_flops(
        model,
        num_tokens=work.num_positions,
        visible_pairs=work.visible_pairs,
        num_logits=work.num_logits,
        num_segments=work.num_segments,
    ).total


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
            "num_parameters": num_parameters(config.model),
            "world_size": ranks.world_size,
            "device": device_name(ranks.device),
            "steps": progress.step,
            "tokens_seen": progress.samples * config.data.sequence_length,
            "tokens_per_second": tokens_per_second(steps),
            "wall_seconds": progress.seconds,
            "validation": validation_summary(read_metrics(run.metrics, kind="validation")),
            "average": average_summary(read_metrics(run.metrics, kind="average")),
            "unigram_bits_per_byte": data.validation_unigram_bits_per_byte,
        },
    )

"""The run whose records sinks get in tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from w1train.config.schema import (
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ScheduleConfig,
    StageConfig,
    TrainingConfig,
    ValidationConfig,
)
from w1train.records.sink import RecordedRun, Sink
from w1train.runtime.run_directory import RunDirectory

TIMESTEPS = [0.25, 0.75]
STAGES = ("one", "two")


def recorded_run(
    directory: Path,
    *,
    step: int = 0,
    num_steps: int = 10,
    num_tokens: int = 100,
    description: dict[str, str] | None = None,
    **logging: Any,
) -> RecordedRun:
    """Return a run named "demo" in ``directory`` that has done ``step`` steps before; ``logging`` sets fields of the section."""
    config = Config(
        name="demo",
        model=ModelConfig(vocab_size=96, num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, max_sequence_length=64),
        data=DataConfig(train="unused", tokenizer="unused", sequence_length=32),
        schedule=ScheduleConfig(stages={name: StageConfig(tokens=1600, learning_rate=1e-2) for name in STAGES}),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=2),
        validation=ValidationConfig(timesteps=TIMESTEPS),
        logging=LoggingConfig(**logging),
    )
    return RecordedRun(config, RunDirectory(directory), step, num_steps, num_tokens, description or {})


@contextlib.contextmanager
def started[Started: Sink](sink: Started) -> Iterator[Started]:
    """Start and close a sink, as a run does."""
    sink.start()
    try:
        yield sink
    finally:
        sink.close(failed=False)

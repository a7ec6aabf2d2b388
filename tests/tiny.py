"""A tiny run for tests: configuration, batches and documents."""

from __future__ import annotations

import torch

from w1train.config.schema import Config, DataConfig, ModelConfig, ScheduleConfig, StageConfig, TrainingConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.data.batch import PackedBatch

VOCAB_SIZE = 96
LENGTH = 32


def tiny_experts(**fields: object) -> dict[str, object]:
    """Return the fields of a model section that make its layers but the first a mixture of 8 experts beside a shared expert."""
    defaults = {"num_experts": 8, "num_active": 2, "ffn_hidden_size": 32, "shared_ffn_hidden_size": 16, "num_dense_layers": 1}
    return {"experts": ExpertsConfig(**{**defaults, **fields})}


def tiny_config(**sections: dict) -> Config:
    """A two-layer model of W1's shape; ``sections`` sets fields, e.g. model={"qk_norm": True}."""
    config = Config(
        name="tiny",
        model=ModelConfig(
            vocab_size=VOCAB_SIZE,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            kv_channels=12,
            ffn_hidden_size=48,
            max_sequence_length=64,
            condition_size=16,
            timestep_frequency_size=16,
        ),
        data=DataConfig(train="unused", tokenizer="unused", sequence_length=LENGTH),
        schedule=ScheduleConfig(stages={"all": StageConfig(tokens=100_000, learning_rate=1e-2)}),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=2, precision="fp32"),
    )
    config.diffusion.num_strata = 8
    for section, fields in sections.items():
        for name, value in fields.items():
            assert hasattr(getattr(config, section), name), f"{section}.{name}"
            setattr(getattr(config, section), name, value)
    return config


def packed_batch(sample_indices: range | list[int], length: int = LENGTH, vocab_size: int = VOCAB_SIZE) -> PackedBatch:
    """Make random documents that depend on the sample index alone. Every third sample ends in padding."""
    rows = [_sample(index, length, vocab_size) for index in sample_indices]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return PackedBatch(**stacked, sample_indices=torch.tensor(list(sample_indices)))


def _sample(index: int, length: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Return the fields of one sample that have a value for each token."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(16, vocab_size, (length,), generator=generator)
    starts = torch.zeros(length, dtype=torch.long)
    starts[torch.randint(1, length, (3,), generator=generator)] = 1
    documents = starts.cumsum(0)
    first = torch.where(torch.cat([torch.ones(1, dtype=torch.long), starts[1:]]) == 1, torch.arange(length), 0).cummax(0).values
    positions = torch.arange(length) - first
    if index % 3 == 2:
        documents[-5:], positions[-5:] = -1, 0
    return {"tokens": tokens, "document_ids": documents.int(), "positions": positions.int()}

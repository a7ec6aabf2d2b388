"""A small valid configuration as a plain tree."""

from __future__ import annotations

from typing import Any

TREE: dict[str, Any] = {
    "name": "test",
    "model": {"vocab_size": 96, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "kv_channels": 12},
    "data": {"train": "train", "tokenizer": "tokenizer.json", "sequence_length": 64},
    "schedule": {
        "stages": {
            "warmup": {"tokens": 100, "learning_rate": 1.0e-3, "style": "linear"},
            "stable": {"tokens": 1000, "learning_rate": 1.0e-3},
            "decay": {"tokens": 200, "learning_rate": 0.0, "style": "one_minus_sqrt"},
        }
    },
    "training": {"global_batch_size": 16, "micro_batch_size": 4},
}


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; mappings that are missing on its path are made."""
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value

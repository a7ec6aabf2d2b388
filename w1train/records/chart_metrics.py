"""The numbers of a record under the names that W&B and TensorBoard show. The names are short, so that people can read them in charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from w1train.records.average_comparison import COLUMNS

# "samples" is the table of generated text; the count has Megatron's name.
_RENAMED = {
    "samples": "consumed_samples",
    "time/step_seconds": "step_seconds",
    "time/tokens_per_second": "tokens_per_second",
    "time/tflops_per_second": "tflops",
    "time/mfu": "mfu",
    "time/data_wait_seconds": "data_wait_seconds",
    "time/communication_seconds": "communication_seconds",
    "time/memory_gib": "memory_gib",
    "time/seconds": "seconds",
}
_LEFT_OUT = {
    "train": ("kind", "step", "stage"),
    "validation": ("kind", "step", "stage", "tokens", "block_size"),
    # The average's own numbers stay; lists and names are for metrics.jsonl.
    "average": ("kind", "step", "tokens", "checkpoint", "metric", "members", "best_member", *(f"member_{name}" for name in COLUMNS)),
}
_PREFIXES = {"train": "", "validation": "validation/", "average": "average/"}


def chart_metrics(record: dict[str, Any], validation_timesteps: Sequence[float] = (), stages: Sequence[str] = ()) -> dict[str, float]:
    """Return the metrics of a record: loss, elbo, loss_by_t/0.05, tokens_per_second, mfu, ..., validation/elbo, ...

    Values that are not numbers are left out (W&B would draw nulls as text). Training's bins of t are named by their middle. The name of a
    stage becomes a number that can be drawn: ``phase``, its place among ``stages``, counted from 1.
    """
    prefix = _PREFIXES[record["kind"]]
    metrics: dict[str, float] = {}
    for key, value in record.items():
        if key == "loss_by_t":
            centers = validation_timesteps if prefix else _bin_centers(len(value))
            for center, item in zip(centers, value, strict=True):
                metrics[f"{prefix}loss_by_t/{center:.3g}"] = item
        elif key not in _LEFT_OUT[record["kind"]]:
            metrics[prefix + _RENAMED.get(key, key)] = value
    if not prefix and record.get("stage") in stages:
        metrics["phase"] = stages.index(record["stage"]) + 1
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def _bin_centers(num_bins: int) -> list[float]:
    return [(index + 0.5) / num_bins for index in range(num_bins)]

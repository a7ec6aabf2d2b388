"""A run directory like one of training, with values from formulas, for tests of code that reads run directories."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from w1train.records.summary import write_summary
from w1train.runtime.record_files import MetricsLog

TOKENS_PER_STEP = 32_768
BYTES_PER_TOKEN = 3.6
UNIGRAM_BITS_PER_BYTE = 2.52
TIMESTEPS = [0.05 + 0.1 * index for index in range(10)]

CODE = '''"""Return the <first> item & the rest."""

def split(items, *, default=None):
    if not items:
        return default, []
    head, *tail = items
    return head, tail
'''


def train_record(step: int, num_steps: int = 400, num_t_bins: int = 10, seed: int = 0) -> dict[str, Any]:
    noise = random.Random(f"{seed}/{step}")
    elbo = _elbo(step) * math.exp(noise.gauss(0, 0.05))
    seconds = 0.81 * math.exp(abs(noise.gauss(0, 0.04))) + (2.0 if step == 1 else 0.0)
    warmup, decay = 0.05 * num_steps, 0.8 * num_steps
    return {
        "kind": "train",
        "step": step,
        "samples": 64 * step,
        "tokens": TOKENS_PER_STEP * step,
        "loss": elbo * math.exp(noise.gauss(0, 0.02)),
        "elbo": elbo,
        "elbo_bits_per_byte": elbo / BYTES_PER_TOKEN / math.log(2),
        "masked_cross_entropy": 0.97 * elbo,
        "mask_ratio": 0.5 + noise.gauss(0, 0.01),
        "loss_by_t": [_loss_at(step, (index + 0.5) / num_t_bins) * math.exp(noise.gauss(0, 0.03)) for index in range(num_t_bins)],
        "grad_norm": 0.3 + 4.0 * math.exp(-step / 30) * math.exp(noise.gauss(0, 0.25)),
        "learning_rate": 3e-4 * min(step / warmup, 1.0, max(0.1, 1 - (step - decay) / (num_steps - decay))),
        "epoch": step / 900,
        "time/step_seconds": seconds,
        "time/tokens_per_second": TOKENS_PER_STEP / seconds,
        "time/tflops_per_second": 0.062 / seconds,
        "time/mfu": None,
        "time/data_wait_seconds": 0.001,
        "time/memory_gib": 1.4,
    }


def expert_values(step: int, num_layers: int = 5, num_experts: int = 16) -> dict[str, Any]:
    """Return what a step of a mixture of experts has besides: loads that become even."""
    top = 1 + 7 * math.exp(-step / 100)
    shares = [
        [2 * (1 + (top - 1) * math.exp(-((expert + layer) % num_experts))) for expert in range(num_experts)] for layer in range(num_layers)
    ]
    loads = [[round(num_experts * load / sum(row), 3) for load in row] for row in shares]
    return {
        "experts/load": top,
        "experts/load_worst_layer": 1.2 * top,
        "experts/load_masked": 8.0,
        "experts/load_noisy": 0.9 * top,
        "experts/load_clean": 0.8 * top,
        "experts/unused": 0.3 * math.exp(-step / 50),
        "experts/rank_load": 1 + 0.1 * top,
        "experts/bias_range": min(0.1, 1e-3 * step),
        **({"experts/loads": loads} if step % 50 == 0 else {}),
    }


def validation_record(step: int, num_timesteps: int = 10) -> dict[str, Any]:
    elbo = _elbo(step)
    return {
        "kind": "validation",
        "step": step,
        "tokens": TOKENS_PER_STEP * step,
        "elbo": elbo,
        "elbo_bits_per_byte": elbo / BYTES_PER_TOKEN / math.log(2),
        "masked_cross_entropy": 0.97 * elbo,
        "loss_by_t": [_loss_at(step, (index + 0.5) / num_timesteps) for index in range(num_timesteps)],
        "time/seconds": 3.1,
    }


def sample_record(step: int, num_steps: int = 400, prompt: str = "") -> dict[str, Any]:
    """Return a text of whose words more are unmasked at later steps."""
    noise = random.Random(step)
    words = [word if noise.random() < step / num_steps else "<|mask|>" for word in CODE.split(" ")]
    return {"step": step, "tokens": TOKENS_PER_STEP * step, "prompt": prompt, "text": " ".join(words)}


def write_fake_run(run_dir: Path, num_steps: int = 400, finished: bool = True) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    interval = max(1, num_steps // 8)
    validations = [validation_record(step) for step in range(0, num_steps + 1, interval)]
    with MetricsLog(run_dir / "metrics.jsonl") as log:
        log.append(validations[0])
        for step in range(1, num_steps + 1):
            log.append(train_record(step, num_steps))
            if step % interval == 0:
                log.append(validations[step // interval])
    with MetricsLog(run_dir / "samples.jsonl") as log:
        for step in range(interval, num_steps + 1, interval):
            log.append(sample_record(step, num_steps))
            log.append(sample_record(step, num_steps, prompt="class Queue:\n"))
    config = {"name": run_dir.name, "model": {"vocab_size": 4096, "num_layers": 6, "hidden_size": 384}, "training": {"seed": 1234}}
    (run_dir / "config.yaml").write_text(json.dumps(config, indent=2))
    if finished:
        write_fake_summary(run_dir, num_steps, validations)
    return run_dir


def write_fake_summary(run_dir: Path, num_steps: int, validations: list[dict[str, Any]]) -> None:
    fields = {
        "name": run_dir.name,
        "num_parameters": 12_583_424,
        "world_size": 2,
        "device": "cpu",
        "steps": num_steps,
        "tokens_seen": TOKENS_PER_STEP * num_steps,
        "tokens_per_second": 38_912.4,
        "wall_seconds": 287.3,
        "validation": {"start": validations[0], "end": validations[-1]},
        "unigram_bits_per_byte": UNIGRAM_BITS_PER_BYTE,
    }
    write_summary(run_dir, fields)


def _elbo(step: int) -> float:
    return 3.1 + 5.2177 * math.exp(-step / 60)


def _loss_at(step: int, t: float) -> float:
    """Return the loss at ``t``. At first all noise levels are equally hard; later a low level is easy."""
    return 8.3177 - (8.3177 - 2.2 - 3.8 * t**1.5) * (1 - math.exp(-step / 80))

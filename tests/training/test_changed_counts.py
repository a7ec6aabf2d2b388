"""A resume with other token counts than those of the checkpoint, on which the noise depends."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints.manifest import Progress  # noqa: E402
from w1train.config.errors import UserError  # noqa: E402
from w1train.config.schedule import stage_steps  # noqa: E402
from w1train.config.schema import Config, StageConfig  # noqa: E402
from w1train.training import checkpoint_loader  # noqa: E402
from w1train.training.checkpoint_loader import CheckpointLoader  # noqa: E402
from w1train.training.schedule_position import SchedulePosition, noise_fingerprint  # noqa: E402


def counts_file(path: Path, last: int) -> str:
    np.save(path, np.array([*[3] * (VOCAB_SIZE - 1), last]))
    return str(path)


def config_with(counts: str) -> Config:
    return tiny_config(diffusion={"objective": "per_id_masked", "loss": "per_id", "token_counts": counts})


def load(monkeypatch: pytest.MonkeyPatch, config: Config, saved: str | None) -> Progress:
    """Resume from a checkpoint of step 2 that was saved with the fingerprint ``saved`` of its noise."""
    progress = Progress(step=2, samples=16, noise=saved)
    monkeypatch.setattr(checkpoint_loader, "load_checkpoint", lambda *_args, **_kwargs: progress)
    monkeypatch.setattr(checkpoint_loader, "all_or_none", lambda check: check())  # there are no other ranks
    data = SimpleNamespace(fingerprint=lambda num_samples: None, train=["train"])
    return CheckpointLoader(config, SimpleNamespace(checkpoints=Path("run")), SimpleNamespace(), data).load(2)


def test_other_counts_are_refused(tmp_path, monkeypatch):
    old, new, same = (config_with(counts_file(tmp_path / f"{name}.npy", last)) for name, last in (("old", 5), ("new", 6), ("same", 5)))
    saved = noise_fingerprint(old, 2)
    assert load(monkeypatch, same, saved).step == 2
    with pytest.raises(UserError, match=rf"diffusion\.token_counts: the counts have changed since .*2 was saved: .* it was {saved}"):
        load(monkeypatch, new, saved)


def test_a_checkpoint_without_a_fingerprint_is_loaded(tmp_path, monkeypatch):
    assert noise_fingerprint(tiny_config(), 2) is None
    assert load(monkeypatch, tiny_config(), None).step == 2
    assert load(monkeypatch, config_with(counts_file(tmp_path / "counts.npy", 5)), None).step == 2


def test_the_fingerprint_is_that_of_the_counts_in_use(tmp_path):
    config = config_with(counts_file(tmp_path / "counts.npy", 5))
    first = noise_fingerprint(config, 1)
    counts_file(tmp_path / "counts.npy", 6)
    assert noise_fingerprint(config, 1) == first, "the noise of this process does not read the file again"


def test_the_stage_of_the_step_decides(tmp_path):
    config = config_with(counts_file(tmp_path / "counts.npy", 5))
    (stage,) = config.schedule.stages.values()
    masked = {"objective": "diffusion", "loss": "cross_entropy"}
    config.schedule.stages["later"] = StageConfig(tokens=stage.tokens, learning_rate=stage.learning_rate, diffusion=masked)
    (_, num_steps) = stage_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)["all"]
    assert noise_fingerprint(config, num_steps) is not None
    assert SchedulePosition(config, Progress(step=num_steps)).noise_fingerprint == noise_fingerprint(config, num_steps)
    assert noise_fingerprint(config, num_steps + 1) is None

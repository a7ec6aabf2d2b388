"""Both kinds of save that the benchmark compares are made, of one state. Times are never asserted."""

from __future__ import annotations

from pathlib import Path

from benchmarks.checkpoints import stall as checkpoint_stall
from benchmarks.checkpoints.stall import MODEL, Measurements, Training, measure, tables
from tests.distributed import run_distributed
from w1train.config.compose import load_config
from w1train.runtime.distributed import distributed

TINY = ("model.vocab_size=320", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.kv_channels=16")


def _measure(_rank: int, _size: int, directory: Path) -> Measurements:
    config = load_config(["recipe=demo", *MODEL, *TINY, "model.ffn_hidden_size=48", "model.condition_size=16"], [])
    with distributed(config.parallel):
        found = measure(Training(config), directory, num_rounds=2, steps_between=1)
        assert [len(table.rows) for table in tables(found, config)] == [4, 2]
        return found


def test_both_kinds_of_save_hold_one_state(tmp_path):
    (found,) = run_distributed(_measure, 1, tmp_path, process_group=False)
    assert len(found.waited) == len(found.stalls) == len(found.background) == 2
    assert len(found.steps_alone) == 2
    assert found.steps_beside
    assert found.num_bytes > 0
    assert sorted(path.name for path in (tmp_path / "waited").iterdir()) == [path.name for path in (tmp_path / "background").iterdir()]
    assert checkpoint_stall._LIMIT == 0.1

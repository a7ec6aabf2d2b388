"""A mixture of experts from training on two ranks that share its experts to its report, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.checkpoint_files import whole_tensors
from tests.end_to_end import traps
from tests.end_to_end.runs import NUM_STEPS, TinyRun
from tests.end_to_end.test_average import in_a_process
from tests.end_to_end.test_resume import require_equal
from w1train import average, evaluate, sample
from w1train.reports.run_report import write_report

OPTIONS = (
    "model.experts.num_experts=4",
    "model.experts.num_active=2",
    "model.experts.ffn_hidden_size=16",
    "model.experts.num_dense_layers=1",
    "model.experts.score=sigmoid",
    "model.experts.has_bias=true",
)
SHARED = (*OPTIONS, "parallel.expert=2")
BIAS = "decoder.layers.1.mlp.router.expert_bias"


def test_one_rank_goes_on_where_two_stopped_and_all_commands_work(tiny_run):
    tiny_run.train(*SHARED, "--max-steps", "6", world_size=2).require(0)
    tiny_run.train(*OPTIONS).require(0)
    assert [record["step"] for record in tiny_run.train_records()] == list(range(1, NUM_STEPS + 1))
    recorded = [record for record in tiny_run.metrics() if record["kind"] == "validation"][-1]
    assert recorded["step"] == NUM_STEPS
    status, out, err = in_a_process(tiny_run, evaluate, "--json")
    assert status == 0, err
    assert json.loads(out)["elbo"] == pytest.approx(recorded["elbo"], rel=1e-6)
    status, out, err = in_a_process(tiny_run, sample, "--json")
    assert status == 0, err
    found = [written["text"] for written in json.loads(out)["samples"]]
    samples = [json.loads(line) for line in tiny_run.samples().splitlines()]
    assert found == [written["text"] for written in samples if written["step"] == NUM_STEPS]
    _assert_averaged(tiny_run)
    assert "elbo" in write_report(tiny_run.path).read_text().lower()


def _assert_averaged(run: TinyRun) -> None:
    """Average the last two checkpoints: the experts' weights, the router's weights and the bias, which stays in fp32."""
    status, out, err = in_a_process(run, average, "--steps", "9,12", "--no-evaluate", "--json")
    assert status == 0, err
    members = [run.checkpoints / f"step_{step:010d}" for step in (9, NUM_STEPS)]
    first, second, mean = (whole_tensors(path) for path in (*members, Path(json.loads(out)["path"])))
    assert not torch.equal(first[BIAS], second[BIAS])
    names = {name.split(".mlp.")[1]: name for name in mean if ".mlp." in name and not name.startswith("optimizer.")}
    assert names.keys() >= {"router.weight", "router.expert_bias", "experts.linear_fc1.weight", "experts.linear_fc2.weight"}
    assert mean[BIAS].dtype == torch.float32
    for name in names.values():
        # A weight in bf16 is the mean of the masters in fp32.
        if mean[name].dtype == torch.float32:
            assert torch.equal(mean[name], (first[name] + second[name]) / 2), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "kill", [traps.after_commit(2), traps.after_shards(2, rank=1), traps.after_samples(1)], ids=["commit", "shards", "samples"]
)
def test_a_kill_changes_nothing(tiny_data, tmp_path, kill, precision):
    options = (*SHARED, f"training.precision={precision}")
    straight, killed = (TinyRun(tiny_data, tmp_path / name) for name in ("straight", "killed"))
    straight.train(*options, world_size=2).require(0)
    assert killed.train(*options, world_size=2, sabotage=kill).killed
    killed.train(*options, world_size=2).require(0)
    require_equal(killed, straight)
    expected = whole_tensors(straight.checkpoints / f"step_{NUM_STEPS:010d}")
    found = whole_tensors(killed.checkpoints / f"step_{NUM_STEPS:010d}")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    _assert_averaged(killed)

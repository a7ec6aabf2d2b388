"""The step's benchmark runs through the Trainer, takes as many layers as fit, and puts work into the right groups."""

from __future__ import annotations

import json

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks.step import __main__ as step
from benchmarks.step import profile as step_profile
from benchmarks.step.step_report import key_results, shares, verdicts
from tests.distributed import run_distributed
from w1train.runtime.ranges import kernel_group

FOUND = {
    "seconds": 0.2,
    "tokens_per_second": 100.0,
    "tflops": 500.0,
    "mfu": 0.5,
    "memory_gib": 20.0,
    "capacity_gib": 80.0,
    "backend": "cudnn",
    "groups": {"attention": 0.05, "GEMM": 0.1},
    "busy": 0.16,
    "largest": [["GEMM", "nvjet", 0.1]],
}


SIZES = ["--device=cpu", "--tiny", "--steps=1", "--warmup=1", "--micro-batches=2", "--layers=2"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of three real runs by variant. In one process of its own: importing megatron-core takes longer than they do."""
    directory, options = tmp_path_factory.mktemp("step"), step._parse(SIZES)
    options.directory = directory
    step.write_data(options, directory)

    def measure(_rank, _size):
        results = {}
        # flex last: a refused run leaves its process groups.
        for variant in ("recipe", "unfused", "flex"):
            options.one = json.dumps({"streams": 2, "variant": variant, "layers": 2})
            assert step.run_one(options) == 0
            results[variant] = json.loads((directory / "found.json").read_text())
        return results

    return run_distributed(measure, 1, process_group=False)[0]


def test_runs_train_and_are_broken_down(found):
    assert (found["recipe"]["backend"], found["unfused"]["backend"]) == ("sdpa", "unfused")
    assert found["flex"]["cannot"].startswith("attention.backend is flex, which cannot serve")
    for variant in ("recipe", "unfused"):
        groups = found[variant]["groups"]
        assert groups.keys() == set(step_profile.GROUPS)
        assert all(groups[group] > 0 for group in ("attention", "GEMM", "norm and modulation", "loss and head", "optimizer"))
    # The same model, data and noise; bf16.
    assert found["recipe"]["loss"] == pytest.approx(found["unfused"]["loss"], rel=1e-2)


def test_report_of_a_dry_run(found, tmp_path, capsys):
    def run_apart(run, *_arguments):
        run.found = found.get(run.variant, found["recipe"])
        run.reason = run.found.get("cannot")

    assert step.main([*SIZES, "--report", f"--output={tmp_path}"], run_apart=run_apart) == 0
    assert "2 streams, unfused" in capsys.readouterr().out
    (report,) = tmp_path.glob("*-step.md")
    assert "flex, 2 layers: attention.backend is flex, which cannot serve" in report.read_text()
    results = json.loads(report.with_suffix(".json").read_text())["results"]
    assert len(results) == 8
    assert report.with_suffix(".svg").read_text().count("<rect") > 8 * 5


def _faked(memory_of_layer, base, fits=99):
    def run_apart(run, _options, _directory, _seconds):
        if run.layers > fits:
            run.reason, run.failed = "torch.OutOfMemoryError: CUDA out of memory", True
        else:
            run.found = {**FOUND, "memory_gib": base + memory_of_layer * run.layers}

    return run_apart


@pytest.mark.parametrize(
    ("memory_of_layer", "fits", "expected"),
    [(1.0, 99, [48]), (2.0, 99, [31]), (2.0, 30, [31, 27]), (2.0, 9, [31, 27, 23])],
)
def test_as_many_layers_as_fit(memory_of_layer, fits, expected, tmp_path):
    """80 GiB, of which 92 % are used: (73.6 - 10) / 2 layers."""
    options = step._parse([])
    runs = step.measure(options, tmp_path, _faked(memory_of_layer, 10.0, fits))
    assert [run.layers for run in runs if run.largest and run.streams == 1] == expected
    assert [run.layers for run in runs if run.largest and run.streams == 2] == expected


def test_out_of_time_is_said(tmp_path):
    runs = step.measure(step._parse(["--budget=0"]), tmp_path, _faked(1.0, 10.0))
    assert runs
    assert all(run.reason == "out of time" for run in runs)
    assert not any(run.failed for run in runs)


def test_a_run_that_the_budget_ends_has_not_failed(tmp_path):
    def run_apart(run, _options, _directory, _seconds):
        run.reason, run.failed = step._NOT_DONE, True

    for budget, failed in ((100, False), (1000, True)):
        runs = step.measure(step._parse([f"--budget={budget}"]), tmp_path, run_apart)
        assert all(run.failed == failed for run in runs)


def test_a_crash_is_a_reason(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'torch.OutOfMemoryError: CUDA out of memory' >&2\necho 'some more talk' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(step.sys, "executable", str(python))
    run = step.Run(1, "recipe", 2)
    step.run_in_process(run, step._parse(SIZES), tmp_path, 60)
    assert run.failed
    assert run.reason == "torch.OutOfMemoryError: CUDA out of memory"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    step.run_in_process(run, step._parse(SIZES), tmp_path, 0.2)
    assert run.reason == "not done after 240 s"


def test_shares_and_verdicts():
    runs = [step.Run(1, "recipe", 48, largest=True, found={**FOUND, "mfu": 0.61}), step.Run(2, "recipe", 30, True, FOUND)]
    assert shares(runs[0]) == pytest.approx({"attention": 0.25, "GEMM": 0.5, "idle": 0.2})
    assert [line.partition(":")[0] for line in verdicts(runs)] == ["holds", "DOES NOT HOLD"]
    assert "30 of 48 layers" in verdicts(runs)[1]
    assert all(line.startswith("not shown") for line in verdicts([]))
    assert key_results(runs)["2 streams, recipe, most layers"]["layers"] == 30


class Model:
    """Two functions, one of them in a range and recomputed in the backward pass."""

    @kernel_group("attention")
    def attend(self, x):
        return (x @ x).softmax(dim=-1)

    def loss(self, weight):
        return (torch.utils.checkpoint.checkpoint(self.attend, weight, use_reentrant=True).exp() @ weight).sum()


def test_backward_and_recomputed_work_goes_where_its_forward_pass_is():
    def profile(_rank, _size):
        # All of them: which take longest is chance.
        step_profile.NUM_LARGEST = 1000
        model, weight = Model(), torch.randn((64, 64), requires_grad=True)
        return step_profile.profile_step(lambda: model.loss(weight).backward(), torch.device("cpu"))

    # In a fork, as the profiler leaves a thread.
    found = run_distributed(profile, 1, process_group=False)[0]
    groups = {}
    for group, kernel, _ in found.largest:
        groups.setdefault(kernel, set()).add(group)
    assert groups["aten::_softmax"] == {"attention"}
    assert groups["aten::_softmax_backward_data"] == {"attention"}
    # One product is attention's, the other is not; exp stands after the range, and its backward pass after the range's operators.
    assert groups["aten::mm"] == {"attention", "GEMM"}
    assert groups.get("aten::exp", {"other"}) == {"other"}
    assert found.busy == pytest.approx(sum(found.seconds.values()))


def _event(name, start, end, device=DeviceType.CPU, **more):
    return FunctionEvent(id=0, name=name, thread=1, start_us=start, end_us=end, device_type=device, **more)


def test_kernels_on_a_gpu():
    launch = _event("aten::mul", 0, 1, sequence_nr=7)
    outer = _event("w1train: norm and modulation", 0, 2)
    launch.set_cpu_parent(outer)
    launch.append_kernel("elementwise_kernel", 0, 10)
    backward = _event("autograd::engine::evaluate_function: MulBackward0", 3, 4, sequence_nr=7, fwd_thread=1)
    backward.append_kernel("elementwise_kernel", 0, 5)
    kernels = [
        _event("elementwise_kernel", 10, 20, DeviceType.CUDA),
        _event("elementwise_kernel", 15, 20, DeviceType.CUDA),
        _event("nvjet_hsh_128x256", 30, 40, DeviceType.CUDA),
        _event("w1train: norm and modulation", 10, 40, DeviceType.CUDA),
    ]
    found = step_profile.break_down([outer, launch, backward, *kernels], on_gpu=True)
    assert found.seconds["norm and modulation"] == pytest.approx(15e-6)
    # Launched by nothing that is known: by its name.
    assert found.seconds["GEMM"] == pytest.approx(10e-6)
    assert found.busy == pytest.approx(20e-6)
    assert sum(found.seconds.values()) == pytest.approx(25e-6)


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("nvjet_tst_128x256_64x4", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "GEMM"),
        ("multi_tensor_apply_kernel", "optimizer"),
        ("vectorized_elementwise_kernel", "other"),
    ],
)
def test_groups_by_name(kernel, group):
    assert step_profile.group_by_name(kernel) == group

"""The attention benchmark runs, checks what it times, and judges by the numbers. Times are never asserted."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.attention import __main__ as attention
from benchmarks.attention.attention_report import tables, verdicts
from benchmarks.attention.measure import Measured, measure_workload
from benchmarks.attention.sides import Side, UnfusedBackend, sides
from benchmarks.attention.workloads import tiny_workloads, workload, workloads
from benchmarks.common.results_page import RESULTS
from tests.attention.cases import inputs_of, long_pack
from w1train.attention.backends.reference import attend_reference
from w1train.config.rules.attention_limits import AttentionCase
from w1train.diagnosis.kernel_checks import relative_errors

CPU = torch.device("cpu")
CASE = AttentionCase("blocks", "bf16", 2, 1, 16)
KEY = "blocks of 32, one document, 4096"


def test_dry_run_reports_what_served_and_why_not(tmp_path, capsys):
    assert attention.main(["--device=cpu", "--tiny", "--repetitions=1", "--report", f"--output={tmp_path}"]) == 0
    (report,) = tmp_path.glob("*-attention.md")
    text = report.read_text()
    assert text.startswith("# Dry run, not a result")
    assert "cudnn: it needs a GPU" in text
    assert "| unfused | " in text
    record = json.loads(report.with_suffix(".json").read_text())
    assert record["dry_run"]
    assert {name.rpartition(": ")[2] for name in record["results"]} == {"sdpa", "unfused", "sdpa dense"}
    assert report.with_suffix(".svg").read_text().startswith("<svg ")
    assert "not shown" in capsys.readouterr().out


def test_a_dry_run_is_no_result():
    before = sorted(RESULTS.iterdir())
    assert attention.main(["--device=cpu", "--tiny", "--report"]) == 2
    assert sorted(RESULTS.iterdir()) == before


def test_workloads_are_those_of_the_issue():
    by_name = {each.name: each for each in workloads([4096, 8192])}
    for block_size in (1, 4, 32, 64, 4096):
        visibility = by_name[f"blocks of {block_size}, one document, 4096"].visibility(CPU)
        # Exact for one document of L tokens: L (L + B) pairs of 2L x 2L.
        assert int(visibility.num_visible_pairs()) == 4096 * (4096 + block_size)
    assert int(by_name["masked diffusion, one document, 8192"].visibility(CPU).num_visible_pairs()) == 8192**2
    assert next(iter(by_name)) == KEY


def test_dense_kernels_are_charged_for_all_pairs():
    rows = {row.side: row for row in measure_workload(workload(64, 32, False), CASE, sides(), CPU, 1)}
    assert rows["sdpa dense"].flops == 4 * 128 * 128 * 2 * 16
    assert rows["sdpa"].flops == 4 * 64 * (64 + 32) * 2 * 16


def _side(name, attend, **more):
    return Side(name, lambda _case, _device: None, lambda _case: (lambda visibility: visibility.dense(), attend), **more)


def test_a_side_that_computes_something_else_is_not_timed():
    right = _side("right", attend_reference)
    wrong = _side("wrong", lambda query, key, value, mask: 1.1 * attend_reference(query, key, value, mask))
    rows = measure_workload(workload(64, 8, True), CASE, [wrong, right], CPU, 2)
    assert rows[0].failed
    assert rows[0].reason.startswith("wrong: relative error 1.0e-01")
    assert not rows[0].forward
    assert not rows[1].failed
    assert len(rows[1].forward) == 2


def test_a_side_that_raises_is_a_row_and_the_others_go_on(caplog):
    def broken(*_tensors):
        raise RuntimeError("no kernel\nfor this")

    rows = measure_workload(workload(64, 8, False), CASE, [_side("broken", broken), _side("right", attend_reference)], CPU, 1)
    assert rows[0].failed
    assert rows[0].reason == "failed: RuntimeError: no kernel"
    assert rows[1].tflops > 0
    assert "no kernel" in caplog.text
    assert "failed: RuntimeError" in tables(rows)[1].rows[0][0]


def test_nan_is_an_infinite_error():
    one = torch.ones((1, 1, 2, 2))
    assert relative_errors([one * float("nan")] * 4, [one] * 4)["output"] == float("inf")


def test_unfused_attention_is_attention():
    """Padding rows too, as it stands in for a backend in the step's benchmark."""
    visibility = long_pack(96, "blocks")
    inputs = inputs_of(visibility, AttentionCase("blocks", "fp32", 4, 2, 8), torch.float32)
    backend = UnfusedBackend()
    output = backend.attend(*inputs, backend.prepare(visibility))
    torch.testing.assert_close(output, attend_reference(*inputs, visibility.dense()))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(output.sum(), inputs))


def _measured(side, milliseconds, flops=1e9, dense=None, peak=None):
    half = milliseconds / 2e3
    return Measured(KEY, side, dense, flops, forward=[half], backward=[half], peak_bytes=peak, plan_bytes=peak and 0)


def _judged(**changed):
    milliseconds = {"cudnn": 1.0, "flex": 1.6, "te": 4.0, "cudnn bias": 3.1, "cudnn dense": 3.2, **changed}
    rows = [_measured("cudnn", milliseconds.pop("cudnn"), 1e9, "cudnn dense", 99)]
    rows += [_measured(side, time, 4e9 if side == "cudnn dense" else 1e9) for side, time in milliseconds.items()]
    return [line.partition(":")[0] for line in verdicts([*rows, _measured("unfused", 9.0, peak=1000)])]


def test_verdicts_follow_the_numbers():
    assert _judged() == ["holds"] * 4
    assert _judged(flex=1.4) == ["DOES NOT HOLD", "holds", "holds", "holds"]
    # Of the two dense masks the faster one counts.
    assert _judged(te=2.9) == ["holds", "DOES NOT HOLD", "holds", "holds"]
    # 1e9 in 1 ms beside 4e9 in 3.1 ms: 77.5 %.
    assert _judged(**{"cudnn dense": 3.1}) == ["holds", "holds", "DOES NOT HOLD", "holds"]


def test_verdicts_say_what_was_not_shown():
    assert all(line.startswith("not shown") for line in verdicts([]))
    absent = Measured(KEY, "cudnn", "cudnn dense", 1e9, reason="it needs a GPU")
    assert all("it needs a GPU" in line for line in verdicts([absent]))
    alone = verdicts([_measured("cudnn", 1.0)])
    assert all(line.startswith("not shown") for line in alone)


@pytest.mark.parametrize("each", list(tiny_workloads()), ids=lambda each: each.name)
def test_tiny_workloads_are_of_every_kind(each):
    assert each.visibility(CPU).num_keys == each.length * (2 if each.block_size else 1)

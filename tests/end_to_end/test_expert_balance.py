"""The bias of experts in a whole run: it moves once for each step that the optimizer takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, NUM_STEPS, Sabotage, TinyRun
from w1train.engine.expert_balance import ExpertBalance
from w1train.records.chart_metrics import chart_metrics
from w1train.reports.live_dashboard import SECTIONS

RATE = 0.03125
"""A power of two, so that multiples of it are exact."""
EXPERTS = (
    *("model.experts.num_experts=4", "model.experts.num_active=1", "model.experts.ffn_hidden_size=16", "model.experts.score=sigmoid"),
    *(
        "model.experts.has_bias=true",
        f"balance.bias_rate={RATE}",
        "balance.auxiliary=0.01",
        "sampling.interval=0",
        "validation.interval=100",
    ),
)


def ranges(run: TinyRun) -> list[float]:
    """The largest bias minus the smallest, before each step."""
    return [record["experts/bias_range"] for record in run.train_records()]


def _counting(sabotage: Sabotage, path: Path) -> Sabotage:
    """Write the number of tokens that experts have counted each time that a step is computed."""

    def install(rank: int) -> None:
        sabotage(rank)
        original = ExpertBalance.gather

        def gather(balance: ExpertBalance) -> dict[str, float]:
            metrics = original(balance)
            with path.open("a") as file:
                print(int(balance._sums.counts.sum()), file=file)
            return metrics

        ExpertBalance.gather = gather  # type: ignore[method-assign]

    return install


def test_a_skipped_step_moves_no_bias(tiny_run, tmp_path):
    trap = traps.nan_in_gradient(rank=0, steps=[1], times=2)
    tiny_run.train(*EXPERTS, sabotage=_counting(trap, tmp_path / "counted")).require(0)
    counted = (tmp_path / "counted").read_text().split()
    assert counted == [counted[-1]] * (NUM_STEPS + 1), "the second computation of a step counts nothing of the first"
    assert int(counted[0]) % (BATCH * LENGTH) == 0
    assert tiny_run.train_records()[0]["skipped"] == "nonfinite"
    assert ranges(tiny_run)[:3] == [0, 0, 2 * RATE], "the first step that is taken moves it up and down by one rate"
    (experts,) = (section for section in SECTIONS if section.name == "Experts")
    drawn = {name for panel in experts.panels for name in panel.metrics}
    for record in tiny_run.train_records():
        assert {"experts/load", "experts/auxiliary_loss"} < (
            names := {name for name in chart_metrics(record) if name.startswith("experts/")}
        )
        assert names <= drawn
    assert ["experts/loads" in record for record in tiny_run.train_records()] == 11 * [False] + [True]


@pytest.mark.slow
def test_a_step_that_is_computed_twice_counts_once(tiny_data, tmp_path):
    expected, disturbed = TinyRun(tiny_data, tmp_path / "expected"), TinyRun(tiny_data, tmp_path / "disturbed")
    expected.train(*EXPERTS).require(0)
    disturbed.train(*EXPERTS, sabotage=traps.nan_in_gradient(rank=0, steps=[2], times=1)).require(0)
    assert disturbed.metrics() == expected.metrics()
    assert len(set(ranges(expected))) > 1, "the bias moves"

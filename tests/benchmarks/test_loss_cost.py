"""The measurement of the losses' cost runs, and measures every loss. Times are never asserted."""

from __future__ import annotations

from benchmarks.common import results_page
from benchmarks.step import loss_cost


def test_prints_every_loss_and_writes_a_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_cost, "write_report", lambda *page: results_page.write_report(*page, directory=tmp_path))
    sizes = {"rows": 6, "chunk-size": 4, "hidden-size": 8, "vocab-size": 40, "turns": 2}
    assert loss_cost.main([*(f"--{name}={value}" for name, value in sizes.items()), "--report"]) == 0
    shown, (report,) = capsys.readouterr().out, tmp_path.iterdir()
    for name in loss_cost.losses(2, 40):
        assert name in shown
        assert f"| {name} |" in report.read_text()


def test_the_ratio_is_that_of_the_medians():
    seconds = {"cross_entropy": [(1.0, 1.0), (2.0, 1.0), (30.0, 1.0)], "kl_is": [(3.0, 1.0), (2.5, 1.5), (2.6, 1.5)]}
    assert [row[2::2] for row in loss_cost.table_of(seconds).rows] == [("1.000", "1.000"), ("1.300", "1.500")]

"""The comparison of an average with its members, in numbers and in words."""

from __future__ import annotations

from tests.reports.fake_run import validation_record, write_fake_run
from w1train.records.average_comparison import average_summary, compare, comparison_lines, verdict
from w1train.reports.run_report import write_report
from w1train.runtime.record_files import MetricsLog

MEMBERS = {
    300: {"elbo": 2.5, "elbo_bits_per_byte": 1.25, "masked_cross_entropy": 2.0},
    100: {"elbo": 3.0, "elbo_bits_per_byte": 1.5, "masked_cross_entropy": 1.0},
    200: {"elbo": 2.75, "elbo_bits_per_byte": 1.375, "masked_cross_entropy": 1.5},
}


def comparison(elbo: float, metric: str = "elbo") -> dict:
    validation = {"elbo": elbo, "elbo_bits_per_byte": elbo / 2, "masked_cross_entropy": 1.25, "loss_by_t": [1.0, 2.0]}
    return compare("average_x", metric, validation, MEMBERS)


def test_a_better_average():
    record = comparison(2.25)
    assert (record["members"], record["best_member"], record["is_better"]) == ([100, 200, 300], 300, True)
    assert record["member_elbo"] == [3.0, 2.75, 2.5]
    assert comparison_lines(record) == [
        "average of 3 checkpoints: average_x",
        "            ELBO  bits/byte  masked CE",
        "step 100  3.0000     1.5000     1.0000",
        "step 200  2.7500     1.3750     1.5000",
        "step 300  2.5000     1.2500     2.0000",
        "average   2.2500     1.1250     1.2500",
        "The average is better than each of its 3 members: ELBO 2.2500 against 2.5000 of step 300 (-10.00%).",
    ]


def test_an_average_that_is_not_better():
    assert (
        "better than 2 of its 3 members, but not better than the best of them: ELBO 2.6000 against 2.5000 of step 300 (+4.00%)"
        in verdict(comparison(2.6))
    )
    assert not comparison(2.5)["is_better"]
    by_cross_entropy = comparison(2.25, "masked_cross_entropy")
    assert (by_cross_entropy["best_member"], by_cross_entropy["is_better"]) == (100, False)
    assert "than 2 of its 3 members, but not better than the best of them: masked CE 1.2500 against 1.0000 of step 100" in verdict(
        by_cross_entropy
    )


def test_without_bytes_there_are_no_bits():
    members = {step: {"elbo": scores["elbo"], "masked_cross_entropy": 1.0} for step, scores in MEMBERS.items()}
    validation = {"elbo": 2.0, "elbo_bits_per_byte": None, "masked_cross_entropy": 1.0}
    record = compare("average_x", "elbo", validation, members)
    assert "bits/byte" not in "\n".join(comparison_lines(record))


def test_the_report_has_a_table_for_each_average(tmp_path):
    run = write_fake_run(tmp_path / "demo", 40)
    assert "Average of checkpoints" not in write_report(run).read_text()
    with MetricsLog(run / "metrics.jsonl") as log:
        for elbo in (2.25, 2.6):
            log.append({"kind": "average", "step": 40, "tokens": 1, **comparison(elbo)})
    text = write_report(run).read_text()
    assert "better than each of its 3 members" in text
    assert "not better than the best of them" in text
    assert text.count("<td>step 200</td>") == 2
    assert f"{validation_record(40)['elbo_bits_per_byte']:.3f}" in text, "the headline is still the last validation's"


def test_the_summary_is_about_the_newest():
    assert average_summary([]) is None
    records = [{"step": 4, **comparison(2.6)}, {"step": 8, **comparison(2.25)}]
    summary = average_summary(records)
    assert summary is not None
    assert (summary["step"], summary["elbo"], summary["is_better"]) == (8, 2.25, True)
    assert "loss_by_t" not in summary

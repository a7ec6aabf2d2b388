"""The log must read back what was written, and must survive being cut anywhere."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reports.fake_run import sample_record, train_record, validation_record
from tests.slow import examples
from w1train.runtime.record_files import MetricsLog, decode_record, encode_record, read_metrics, recorded_steps

numbers = st.none() | st.integers(-(2**63), 2**63) | st.floats()
values = numbers | st.text(st.characters(codec=None)) | st.lists(numbers, max_size=5)
records = st.dictionaries(st.text(min_size=1).filter(lambda key: key not in ("nonfinite", "step") and "/" not in key), values, max_size=6)


def write(path: Path, items: list[dict]) -> bytes:
    with MetricsLog(path) as log:
        for item in items:
            log.append(item)
    return path.read_bytes()


def fake_records() -> list[dict]:
    items = [validation_record(0)]
    for step in range(1, 7):
        items.append(train_record(step, num_t_bins=3))
        if step % 3 == 0:
            items.append(validation_record(step))
    items[2]["loss"] = math.inf
    items.append(sample_record(6, prompt="\u00e9\u2028"))
    return items


def bits(value):
    """Distinguishes what == does not: -0.0 from 0.0, 1 from 1.0, NaN from nothing."""
    return json.dumps(value)


@given(records)
def test_records_read_back_bit_for_bit(record):
    line = encode_record(record)
    assert line.count(b"\n") == 1
    json.loads(line, parse_constant=pytest.fail)
    assert bits(decode_record(line)) == bits(record)


def test_nonfinite_numbers_are_null_and_named():
    line = encode_record({"step": 1, "loss": math.nan, "loss_by_t": [1.0, None, -math.inf]})
    expected = {"step": 1, "loss": None, "loss_by_t": [1.0, None, None], "nonfinite": {"loss": "nan", "loss_by_t/2": "-inf"}}
    assert json.loads(line) == expected


def test_a_record_is_on_disk_once_appended(tmp_path):
    log = MetricsLog(tmp_path / "logs" / "metrics.jsonl")
    log.append(train_record(1))
    assert read_metrics(log.path) == [train_record(1)]
    log.close()


def test_reading_by_kind(tmp_path):
    write(tmp_path / "m", fake_records())
    assert [record["step"] for record in read_metrics(tmp_path / "m", "validation")] == [0, 3, 6]
    assert len(read_metrics(tmp_path / "m", "train")) == 6
    assert recorded_steps(tmp_path / "m", "validation") == {0, 3, 6}
    assert recorded_steps(tmp_path / "m", "train") == {1, 2, 3, 4, 5, 6}


@settings(max_examples=examples(200), deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_resumes_exactly(tmp_path_factory, data):
    """Whatever the cut and the checkpoint's step: what is left is what was whole and not after the step, byte for byte."""
    path = tmp_path_factory.mktemp("cut") / "m"
    items = fake_records()
    whole = write(path, items)
    cut = data.draw(st.integers(0, len(whole)), label="cut")
    step = data.draw(st.integers(-1, 7), label="step")
    path.write_bytes(whole[:cut])

    lines = [encode_record(item) for item in items]
    ends = [sum(map(len, lines[: index + 1])) for index in range(len(lines))]
    # A line that lacks only its newline is whole.
    survivors = [index for index, end in enumerate(ends) if end - 1 <= cut]
    assert [bits(record) for record in read_metrics(path)] == [bits(items[index]) for index in survivors]

    with MetricsLog(path) as log:
        num_dropped = log.truncate_after(step)
        kept = [index for index in survivors if items[index]["step"] <= step]
        assert num_dropped == len(survivors) - len(kept)
        assert path.read_bytes() == b"".join(lines[index] for index in kept)
        log.append(train_record(99))
    assert path.read_bytes() == b"".join(lines[index] for index in kept) + encode_record(train_record(99))
    assert list(path.parent.iterdir()) == [path]


def test_a_torn_line_longer_than_the_read_buffer_is_dropped(tmp_path):
    path = tmp_path / "m"
    first = encode_record({"step": 1})
    path.write_bytes(first + encode_record({"step": 2, "text": "x" * 300_000})[:-2])
    MetricsLog(path).close()
    assert path.read_bytes() == first


def test_what_was_dropped_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "m"
    path.write_bytes(write(path, fake_records())[:-5])
    with MetricsLog(path) as log:
        log.truncate_after(4)
    assert "torn last line" in caplog.text
    assert "dropped 3 records after step 4" in caplog.text


@pytest.mark.parametrize("bad", [b'{"step": 1\n', b"[]\n", b'{"loss": 1}\n', b"\xff\n"])
def test_a_bad_line_in_the_middle_is_an_error_that_names_it(tmp_path, bad):
    path = tmp_path / "m"
    good = encode_record({"step": 1})
    path.write_bytes(good + bad + good)
    with pytest.raises(ValueError, match="m, line 2, is not a record"):
        read_metrics(path)
    with MetricsLog(path) as log, pytest.raises(ValueError, match="line 2"):
        log.truncate_after(0)
    assert path.read_bytes() == good + bad + good
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_without_a_step_is_refused(tmp_path):
    with MetricsLog(tmp_path / "m") as log, pytest.raises(AssertionError):
        log.append({"loss": 1.0})

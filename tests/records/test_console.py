"""The texts that the console prints, on a terminal and into a log file."""

from __future__ import annotations

import io
import logging
import re
import sys
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests.records.recorded_run import recorded_run, started
from tests.reports.fake_run import train_record, validation_record
from w1train.records.average_comparison import compare
from w1train.records.console import ConsoleSink, print_block
from w1train.records.sample_text import shorten, split_masks, visible_masks
from w1train.runtime.quantities import duration, quantity


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(step: int) -> dict:
    return train_record(step) | {
        "loss": 3.25,
        "elbo": 3.5,
        "elbo_bits_per_byte": 1.4,
        "learning_rate": 3e-4,
        "grad_norm": 0.9,
        "time/tokens_per_second": 38_912.4,
        "time/mfu": 0.412,
    }


def console(stream: TextIO, clock: Clock | None = None, **options: Any) -> ConsoleSink:
    """Return the console of a run of 10 steps, each of which is a line."""
    return ConsoleSink(recorded_run(Path("unused"), **{"interval": 1, **options}), stream, clock or Clock())


def run_steps(stream, steps, clock, **options):
    options = {"num_tokens": 1_310_720, "num_steps": 1200, "interval": 10} | options
    with started(console(stream, clock, **options)) as sink:
        for step in steps:
            clock.now += 2.0
            sink.record(record(step))
    return stream.getvalue().removeprefix("demo\n\n")


def test_plain_lines_every_interval():
    text = run_steps(io.StringIO(), range(1, 21), Clock())
    numbers = "loss  3.2500  ELBO  3.5000 nats/token  1.4000 bits/byte  lr 3.00e-04  grad     0.9   38.9k tokens/s  MFU  41.2%"
    assert text.splitlines() == [
        f"step    10/1,200  {numbers}  0:20 elapsed  39:40 left",
        f"step    20/1,200  {numbers}  0:40 elapsed  39:20 left",
    ]


def test_the_last_step_is_always_printed():
    text = run_steps(io.StringIO(), range(1, 6), Clock(), num_steps=5)
    assert len(text.splitlines()) == 1
    assert text.startswith("step 5/5")


def test_a_resumed_run_counts_its_own_time_only():
    text = run_steps(io.StringIO(), range(1001, 1011), Clock(), step=1000)
    assert "step 1,010/1,200" in text
    assert "0:20 elapsed  6:20 left" in text


def test_one_step_gives_no_eta():
    assert "--:-- left" in run_steps(io.StringIO(), [10], Clock())


def test_null_measurements_are_left_out():
    stream = io.StringIO()
    with started(console(stream)) as sink:
        sink.record(record(1) | {"elbo_bits_per_byte": None, "time/mfu": None, "loss": float("nan")})
    assert "MFU" not in stream.getvalue()
    assert "bits/byte" not in stream.getvalue()
    assert "loss     nan" in stream.getvalue()


def test_header_validation_and_samples_are_plain_text():
    stream = io.StringIO()
    description = {"model": "12.6M parameters", "world size": "2", "path": "[/tmp/x] [bold]"}
    with started(console(stream, description=description)) as sink:
        sink.record(validation_record(0))
        sink.record_samples([{"step": 4, "tokens": 1, "prompt": "a [/INST]", "text": "a [/INST] b<|mask|><|mask|>:\n" + "x" * 500}])
    lines = stream.getvalue().splitlines()
    assert lines[:5] == ["demo", "  model       12.6M parameters", "  world size  2", "  path        [/tmp/x] [bold]", ""]
    assert lines[5] == "validation at step 0:  ELBO  8.3177 nats/token  3.3333 bits/byte  (3.1 s)"
    assert lines[6].startswith("sample at step 4: a [/INST] b\u2591\u2591:\u23cexxx")
    assert lines[6].endswith("x...")
    assert len(lines[6]) < 300
    assert len(lines) == 7


def test_a_block_is_a_line_for_each_value_in_a_file_and_fits_into_a_terminal(monkeypatch):
    rows = {"data": "one two three four five six seven", "next": "w1train sample runs/a-very-long-name\nw1train report"}
    stream = io.StringIO()
    print_block("demo", rows, stream)
    lines = [
        "",
        "demo",
        "  data  one two three four five six seven",
        "  next  w1train sample runs/a-very-long-name",
        "        w1train report",
    ]
    assert stream.getvalue().splitlines() == lines
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    print_block("demo", {"data": rows["data"]}, terminal)
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert shown.splitlines() == ["", "demo", "  data  one two three four", "        five six seven"]


def test_a_block_that_nobody_can_read_is_a_warning(caplog):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("No space left on device")

    print_block("demo is finished", {"a": "b"}, Full())
    assert caplog.messages == ["standard output accepts no more text (No space left on device): demo is finished"]


def test_an_average_is_a_table():
    stream = io.StringIO()
    members = {4: {"elbo": 2.0}, 8: {"elbo": 1.5}}
    with started(console(stream)) as sink:
        sink.record({"kind": "average", "step": 8, "tokens": 1, **compare("average_x", "elbo", {"elbo": 1.0}, members)})
    assert "average of 2 checkpoints: average_x" in stream.getvalue()
    assert "The average is better than each of its 2 members" in stream.getvalue()


def test_a_terminal_gets_a_bar_with_everything(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    text = run_steps(Terminal(), range(1, 4), Clock())
    for piece in ("step", "3/1200", "loss  3.2500", "1.4000 bits/byte", "38.9k tokens/s", "MFU", "98.3k / 1.31M tokens", "39:54 left"):
        assert piece in text, piece


def test_a_narrow_terminal_gets_what_matters_most(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    shown = {}
    for width in (200, 100, 60, 30):
        monkeypatch.setenv("COLUMNS", str(width))
        with started(console(Terminal(), num_tokens=1_310_720, num_steps=1200)) as sink:
            sink.record(record(1) | {"stage": "stable", "epoch": 0.25})
            shown[width] = sink._metrics_line.plain
    assert all(len(line) <= width for width, line in shown.items())
    assert "grad" in shown[200]
    assert "32.8k / 1.31M tokens" in shown[200]
    assert shown[100] == "loss  3.2500  1.4000 bits/byte   38.9k tokens/s  MFU  41.2%  stage stable  epoch 0.25"
    assert shown[60] == "loss  3.2500   38.9k tokens/s  MFU  41.2%  stage stable"
    assert shown[30] == "loss  3.2500   38.9k tokens/s"


def test_stage_and_epoch_stand_behind_the_times_of_a_line():
    stream = io.StringIO()
    with started(console(stream)) as sink:
        sink.record(record(1) | {"stage": "stable", "epoch": 0.254})
    assert stream.getvalue().endswith("left  stage stable  epoch 0.25\n")


def test_log_lines_go_above_the_bar(monkeypatch):
    """A log handler that was made before the bar must not write into it, and must get its stream back."""
    monkeypatch.setenv("TERM", "xterm")
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    handler = logging.StreamHandler(error)
    log = logging.getLogger("test_log_lines_go_above_the_bar")
    log.addHandler(handler)
    stream = Terminal()
    with started(console(stream)):
        log.warning("saved [step] 4")
        assert error.getvalue() == ""
    log.warning("after")
    log.removeHandler(handler)
    assert "saved [step] 4" in stream.getvalue()
    assert error.getvalue() == "after\n"


def test_a_terminal_that_cannot_show_a_character_does_not_stop_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with started(console(stream)) as sink:
        sink.record_samples([{"step": 1, "tokens": 1, "prompt": "", "text": "\u00e9<|mask|>"}])
    stream.flush()
    assert raw.getvalue() == b"demo\n\nsample at step 1: ??\n"


@pytest.mark.parametrize("mask", ["<|mask|>", "<mask>", "[MASK]", "<|MASK|>"])
def test_masks_are_seen_however_they_are_spelled(mask):
    assert visible_masks(f"a{mask}{mask} b{mask}") == "a\u2591\u2591 b\u2591"
    assert list(split_masks(f"{mask}a{mask}{mask}")) == [("", 1), ("a", 0), ("", 2)]


def test_shortening_counts_a_mask_as_one():
    assert visible_masks(shorten("ab" + "<mask>" * 10 + "cd", 5)) == "ab\u2591\u2591\u2591..."
    assert shorten("abc", 3) == "abc"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (38_912.4, "38.9k"), (999_960, "1M"), (3_739_097_600, "3.74B"), (5e11, "500B"), (0.5, "0.5")],
)
def test_quantities(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (245, "4:05"), (3723, "1:02:03"), (183_840, "2d 03:04")])
def test_durations(seconds, text):
    assert duration(seconds) == text

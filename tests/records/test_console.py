"""What is printed, on a terminal and into a log."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from tests.reports.fake_run import sample_record, train_record, validation_record
from w1train.records.console import TrainingConsole
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


def run_steps(stream, steps, clock, **options):
    options = {"total_tokens": 1_310_720, "total_steps": 1200, "start_step": 0, "enabled": True, "interval": 10} | options
    with TrainingConsole(**options, stream=stream, clock=clock) as console:
        for step in steps:
            clock.now += 2.0
            console.update(record(step))
    return stream.getvalue()


def test_plain_lines_every_interval():
    text = run_steps(io.StringIO(), range(1, 21), Clock())
    numbers = "loss  3.2500  ELBO  3.5000 nats/token  1.4000 bits/byte  lr 3.00e-04  grad     0.9   38.9k tokens/s  MFU  41.2%"
    assert text.splitlines() == [
        f"step    10/1,200  {numbers}  0:20 elapsed  39:40 left",
        f"step    20/1,200  {numbers}  0:40 elapsed  39:20 left",
    ]


def test_the_last_step_is_always_printed():
    text = run_steps(io.StringIO(), range(1, 6), Clock(), total_steps=5)
    assert len(text.splitlines()) == 1
    assert text.startswith("step 5/5")


def test_a_resumed_run_counts_its_own_time_only():
    text = run_steps(io.StringIO(), range(1001, 1011), Clock(), start_step=1000)
    assert "step 1,010/1,200" in text
    assert "0:20 elapsed  6:20 left" in text


def test_one_step_gives_no_eta():
    assert "--:-- left" in run_steps(io.StringIO(), [10], Clock())


def test_null_measurements_are_left_out():
    stream = io.StringIO()
    with TrainingConsole(100, 10, 0, True, 1, stream=stream, clock=Clock()) as console:
        console.update(record(1) | {"elbo_bits_per_byte": None, "time/mfu": None, "loss": float("nan")})
    assert "MFU" not in stream.getvalue()
    assert "bits/byte" not in stream.getvalue()
    assert "loss     nan" in stream.getvalue()


def test_header_validation_and_samples_are_plain_text():
    stream = io.StringIO()
    with TrainingConsole(100, 10, 0, True, 1, stream=stream) as console:
        console.print_header("demo", {"model": "12.6M parameters", "world size": 2, "path": "[/tmp/x] [bold]"})
        console.print_validation(validation_record(0))
        console.print_sample({"step": 4, "tokens": 1, "prompt": "def [/INST]", "text": "def [/INST] f<|mask|><|mask|>:\n" + "x" * 500})
        console.print_line("saved [step] 4")
    lines = stream.getvalue().splitlines()
    assert lines[:5] == ["demo", "  model       12.6M parameters", "  world size  2", "  path        [/tmp/x] [bold]", ""]
    assert lines[5] == "validation at step 0:  ELBO  8.3177 nats/token  3.3333 bits/byte  (3.1 s)"
    assert lines[6].startswith("sample at step 4: def [/INST] f\u2591\u2591:\u23cexxx")
    assert lines[6].endswith("x...")
    assert len(lines[6]) < 300
    assert lines[7:] == ["saved [step] 4"]


def test_disabled_prints_nothing():
    stream = Terminal()
    with TrainingConsole(100, 10, 0, False, 1, stream=stream) as console:
        console.print_header("demo", {"a": "b"})
        console.update(record(1))
        console.print_validation(validation_record(0))
        console.print_sample(sample_record(1))
        console.print_line("x")
    assert stream.getvalue() == ""


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
        with TrainingConsole(1_310_720, 1200, 0, True, 10, stream=Terminal(), clock=Clock()) as console:
            console.update(record(1) | {"stage": "stable", "epoch": 0.25})
            shown[width] = console._metrics_line.plain
    assert all(len(line) <= width for width, line in shown.items())
    assert "grad" in shown[200]
    assert "32.8k / 1.31M tokens" in shown[200]
    assert shown[100] == "loss  3.2500  1.4000 bits/byte   38.9k tokens/s  MFU  41.2%  stage stable  epoch 0.25"
    assert shown[60] == "loss  3.2500   38.9k tokens/s  MFU  41.2%  stage stable"
    assert shown[30] == "loss  3.2500   38.9k tokens/s"


def test_stage_and_epoch_stand_behind_the_times_of_a_line():
    stream = io.StringIO()
    with TrainingConsole(100, 10, 0, True, 1, stream=stream, clock=Clock()) as console:
        console.update(record(1) | {"stage": "stable", "epoch": 0.254})
    assert stream.getvalue().endswith("left  stage stable  epoch 0.25\n")


def test_log_lines_go_above_the_bar(monkeypatch):
    """A handler made before the bar must not write into it, and must get its stream back."""
    monkeypatch.setenv("TERM", "xterm")
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    handler = logging.StreamHandler(error)
    log = logging.getLogger("test_log_lines_go_above_the_bar")
    log.addHandler(handler)
    stream = Terminal()
    with TrainingConsole(100, 10, 0, True, 1, stream=stream):
        log.warning("saved [step] 4")
        assert error.getvalue() == ""
    log.warning("after")
    log.removeHandler(handler)
    assert "saved [step] 4" in stream.getvalue()
    assert error.getvalue() == "after\n"


def test_a_terminal_that_cannot_show_a_character_does_not_stop_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with TrainingConsole(100, 10, 0, True, 1, stream=stream) as console:
        console.print_sample({"step": 1, "tokens": 1, "prompt": "", "text": "\u00e9<|mask|>"})
    stream.flush()
    assert raw.getvalue() == b"sample at step 1: ??\n"


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

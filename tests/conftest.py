"""What every test runs under. Imports nothing heavy: tests that need no torch start without it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator

import hypothesis
import pytest

# Before anything imports torch: one thread a process keeps sums in one order, lets the parent fork ranks
# (tests/distributed.py) and leaves the other cores to them.
os.environ["OMP_NUM_THREADS"] = "1"
# A key in the developer's environment would upload the tests' runs.
os.environ.pop("WANDB_API_KEY", None)
os.environ["WANDB_MODE"] = "offline"

# Each process that a test starts would otherwise compile this package anew, and each of pytest's workers all tests.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Python's own threshold of 700 new objects spends a tenth of the suite's time on looking for garbage; forked ranks inherit this one.
gc.set_threshold(100_000, 50, 100)

# A shell starts its background jobs with Ctrl-C ignored, and ranks that tests interrupt would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if sys.platform == "linux":
    # Ranks exchange thousands of short messages on few cores: woken ones wait their turn instead of pushing the sender aside, which
    # costs a tenth of the time of the tests of layouts.
    with contextlib.suppress(OSError):  # some sandboxes have one way of scheduling only
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# Other processes share the machine, so a slow example is no failure; CI draws the same examples every time.
_SETTINGS = hypothesis.settings(deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.register_profile("all", _SETTINGS)
# `make test` draws a quarter of the examples.
hypothesis.settings.register_profile("not slow", _SETTINGS, max_examples=_SETTINGS.max_examples // 4)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs unless they are asked for, so that the same tests run the same way on every machine. Choose the number of examples."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    hypothesis.settings.load_profile("not slow" if config.getoption("markexpr") == "not slow" else "all")


_DIRECTORIES_OF_LONG_TESTS = ("parallel", "launch", "end_to_end", "training", "planning", "conversion", "chaos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of long tests first, so that in the end no worker has minutes left while the others have nothing (`make test` has pytest-xdist
    hand the files out in this order). Those that wait for launchers early: meanwhile, the other workers compute."""
    places = {name: place for place, name in enumerate(_DIRECTORIES_OF_LONG_TESTS)}
    items.sort(key=lambda item: places.get(item.nodeid.split("/")[1], len(places)))


def pytest_collection_finish() -> None:
    """Leave the modules and tests that are there now out of each later search for garbage, in this process and in forked ranks."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter find these objects at its end again: extensions print their names if they are still there then."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        pytest.skip("needs a GPU, and GPUs are hidden from the CPU tests: run `make test-gpu`")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and torch finds none")


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A command that a test runs in this process sets logging up; the next test must not find the loggers at its levels, nor its handlers,
    which write to the stream of the earlier test."""
    loggers = [logging.getLogger(), logging.getLogger("w1train")]
    levels = [each.level for each in loggers]
    _remove_handlers(loggers)  # a fixture of a module may have left some
    yield
    _remove_handlers(loggers)
    for each, level in zip(loggers, levels, strict=True):
        each.setLevel(level)


def _remove_handlers(loggers: list[logging.Logger]) -> None:
    """Remove all handlers but those that pytest has for each phase of a test."""
    for logger in loggers:
        for handler in logger.handlers[:]:
            if not type(handler).__module__.startswith("_pytest."):
                logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Tests that draw from torch's global generator draw the same numbers in any order of tests."""
    if (torch := sys.modules.get("torch")) is not None:
        # torch.manual_seed seeds the GPUs too, and notes the stack for each kind of device that is absent.
        (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(1234)

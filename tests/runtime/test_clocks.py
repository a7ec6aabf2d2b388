"""Clocks that nobody sets."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from w1train.runtime.clocks import SteadyTimeOfDay, seconds_since_start


@given(passed=st.lists(st.floats(0, 1e5), max_size=5), jumps=st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=5))
def test_the_time_of_day_passes_as_time_does(passed, jumps):
    clock = {"monotonic": 50.0, "time": 1.7e9}
    monotonic, of_day = time.monotonic, time.time
    time.monotonic, time.time = lambda: clock["monotonic"], lambda: clock["time"]
    try:
        steady, before = SteadyTimeOfDay(), 1.7e9
        for seconds, jump in zip(passed, jumps, strict=False):
            clock["monotonic"] += seconds
            clock["time"] += seconds + jump
            assert abs(steady() - before - seconds) < 1e-3
            before = steady()
    finally:
        time.monotonic, time.time = monotonic, of_day


def test_the_age_of_a_process_is_measured_by_no_time_of_day():
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); time.sleep(0.3); time.time = lambda: 0.0\n"
        "from w1train.runtime.clocks import seconds_since_start\nprint(seconds_since_start())"
    )
    age = float(subprocess.run([sys.executable, "-c", code, os.getcwd()], check=True, capture_output=True, timeout=60).stdout)
    assert 0.25 < age < 60
    assert seconds_since_start() > age - 60

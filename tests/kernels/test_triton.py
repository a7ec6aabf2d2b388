"""The Triton kernels without a GPU: interpreted, and compiled for Hopper, each in a process of its own.

Triton decides when it is imported whether it interprets, and megatron-core, which other tests import, imports it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
pytest.importorskip("triton")


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_interpreted_kernels_equal_the_oracle(marker):
    options = ("-q", "-p", "no:cacheprovider", "-m", marker)
    result = _run("-m", "pytest", *options, "tests/kernels/under_interpreter.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_kernels_compile_for_hopper(tmp_path):
    """Without a byte of local memory, which is slow. (The cosine of a huge angle alone, above 10^5, wants some.)"""
    result = _run("-m", "tests.kernels.hopper", TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 10
    for kernel in kernels:
        assert kernel["bytes"] > 0, kernel
        assert kernel["target"], kernel
        assert kernel["local"] == [] or kernel["kernel"] == "_rotate", kernel

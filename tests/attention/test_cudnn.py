"""cuDNN's attention without a GPU: the kernels compile for Hopper, and the plan is asked for what the mask is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.attention.cases import long_pack
from w1train.attention.backends import cudnn
from w1train.config.rules.attention_limits import AttentionCase

REPOSITORY = Path(__file__).resolve().parents[2]
CASE = AttentionCase("blocks", "bf16", 4, 2, 64)


@pytest.mark.slow
def test_kernels_compile_for_hopper():
    """Mask plan, forward and backward for W1's heads, on this CPU: 25 s of processor time."""
    reason = cudnn.missing_packages()
    if reason is not None:
        pytest.skip(f"cuDNN's kernels cannot be compiled: {reason}")
    command = [sys.executable, "-m", "tests.attention.compile_cudnn", "24", "24", "128", "fast"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    seconds = json.loads(result.stdout.splitlines()[-1])
    assert set(seconds) == {"plan", "forward", "backward"}


def test_the_plan_is_made_of_the_endpoints(monkeypatch):
    """[1, e, b * q] in the order of the rows, with shapes that own no memory."""
    asked = {}

    def create_mask_plan(endpoints, query, key, value, *, build_backward):
        asked.update(endpoints=endpoints, query=query, key=key, value=value, build_backward=build_backward)

    monkeypatch.setitem(sys.modules, "cudnn", type(sys)("cudnn"))
    library = type(sys)("cudnn.flex_attention")
    library.create_mask_plan = create_mask_plan
    monkeypatch.setitem(sys.modules, "cudnn.flex_attention", library)
    visibility = long_pack(300, "blocks")
    cudnn.create_plan(visibility, CASE, backward=True)
    assert asked["build_backward"]
    assert torch.equal(asked["endpoints"][0].unflatten(1, (2, 600)), visibility.endpoints)
    assert asked["endpoints"].is_contiguous()
    assert [tuple(asked[name].shape) for name in ("query", "key", "value")] == [(2, 600, 4, 64), (2, 600, 2, 64), (2, 600, 2, 64)]
    assert asked["query"].untyped_storage().nbytes() == 64 * 2

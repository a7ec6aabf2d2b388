"""Compiles cuDNN's attention kernels for sm_90a without a GPU: the mask plan, forward and backward, through our own backend.

A program, run by test_cudnn.py in a process of its own: it pretends that there is a GPU. Prints what it compiled, in seconds.
"""

import contextlib
import json
import os
import sys
import time

os.environ["FLEX_ATTENTION_ARCH"] = os.environ["CUTE_DSL_ARCH"] = "sm_90a"

import torch
from cudnn.flex_attention import execution
from cudnn.flex_attention.plan import validation
from torch._subclasses.fake_tensor import FakeTensorMode

from w1train.attention.backends.cudnn import CudnnBackend, CudnnPlan, create_plan
from w1train.attention.visibility import block_diffusion_visibility
from w1train.config.rules.attention_limits import AttentionCase

LENGTH = 1024


def main(num_heads: int, num_groups: int, channels: int, deterministic: bool) -> dict[str, float]:
    """Seconds of each part."""
    validation.get_device_arch = lambda _index=None: 90
    torch.cuda.device = lambda _device: contextlib.nullcontext()
    case = AttentionCase("blocks", "bf16", num_heads, num_groups, channels, deterministic=deterministic)
    backend = CudnnBackend(case)
    seconds = {}
    with FakeTensorMode():
        visibility = block_diffusion_visibility(torch.zeros((1, LENGTH), dtype=torch.int32, device="cuda"), 32, "document")
        # The layout of megatron-core's projections, [rows, b, heads, d], as the backend gets it.
        query, key, value = (
            torch.empty((2 * LENGTH, 1, heads, channels), dtype=torch.bfloat16, device="cuda", requires_grad=True).permute(1, 2, 0, 3)
            for heads in (num_heads, num_groups, num_groups)
        )
        started = time.perf_counter()
        plan = CudnnPlan(create_plan(visibility, case, backward=True), None, ())
        seconds["plan"] = time.perf_counter() - started
        started = time.perf_counter()
        output = backend.attend(query, key, value, plan)
        seconds["forward"] = time.perf_counter() - started
        assert output.shape == query.shape
        started = time.perf_counter()
        # By hand, for autograd's engine asks for the streams of a GPU.
        query, key, value, output = (tensor.detach().transpose(1, 2) for tensor in (query, key, value, output))
        normalizer = torch.empty((1, num_heads, 2 * LENGTH), dtype=torch.float32, device="cuda")
        gradients = execution._flex_attention_backward(
            query, key, value, output, torch.empty_like(output), normalizer, mask_plan=plan.mask_plan, deterministic=deterministic
        )
        seconds["backward"] = time.perf_counter() - started
        assert [tuple(gradient.shape) for gradient in gradients] == [tuple(tensor.shape) for tensor in (query, key, value)]
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(*(int(argument) for argument in sys.argv[1:4]), deterministic=sys.argv[4] == "deterministic")))

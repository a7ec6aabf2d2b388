"""Compiles every Triton kernel for a Hopper GPU, with nothing but the compiler; prints a line of JSON for each. Run by test_triton.py."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from w1train.kernels import triton_cross_entropy, triton_modulation, triton_noised_softmax, triton_rotary

HOPPER = GPUTarget("cuda", 90, 32)
W1_HIDDEN = 2048
BF16, FP32, INT32, INT64 = "*bf16", "*fp32", "*i32", "*i64"
PIECES = dict.fromkeys(("order", "starts", "ends", "segments"), INT32)

# Kernel -> types of its pointers (every other argument but eps and direction is an i32), constants, warps.
KERNELS = {
    triton_modulation._norm_forward: (
        dict.fromkeys(("x", "weight", "shift", "scale", "y"), BF16) | {"index": INT64, "rstd": FP32, "eps": "fp32"},
        {"MODULATED": True, "INDEXED": True, "BLOCK": W1_HIDDEN},
        4,
    ),
    triton_modulation._norm_backward: (
        dict.fromkeys(("gradient", "x", "weight", "scale", "grad_x"), BF16)
        | dict.fromkeys(("rstd", "sums_normed", "sums_gradient"), FP32)
        | PIECES,
        {"MODULATED": True, "BLOCK": W1_HIDDEN},
        4,
    ),
    triton_modulation._gate_forward: (
        dict.fromkeys(("residual", "gate", "x", "y"), BF16) | {"index": INT64},
        {"INDEXED": True, "BLOCK": W1_HIDDEN},
        4,
    ),
    triton_modulation._gate_backward: (
        dict.fromkeys(("gradient", "x", "gate", "grad_x"), BF16) | {"sums": FP32} | PIECES,
        {"BLOCK": W1_HIDDEN},
        4,
    ),
    triton_modulation._sum_pieces: ({"partial": FP32, "sums": FP32, "first": INT32}, {"BLOCK": 256}, 4),
    triton_rotary._rotate: (
        {"t": BF16, "output": BF16, "angles": FP32, "direction": "fp32"},
        {"HEADS": 32, "PAIRS": 32, "REST": 64},
        4,
    ),
    triton_cross_entropy._row_statistics: (
        {"logits": BF16, "columns": INT64} | dict.fromkeys(("largest", "total", "chosen"), FP32),
        {"BLOCK": triton_cross_entropy.BLOCK},
        8,
    ),
    triton_cross_entropy._write_gradient: (
        {"logits": BF16, "columns": INT64, "largest": FP32, "scale": FP32, "gradients": FP32},
        {"BLOCK": triton_cross_entropy.BLOCK},
        8,
    ),
    triton_noised_softmax._noised_sums: (
        {"logits": BF16} | dict.fromkeys(("largest", "scale", "ratio", "sums"), FP32),
        {"BLOCK": triton_noised_softmax.BLOCK},
        8,
    ),
    triton_noised_softmax._write_noised_gradient: (
        {"logits": BF16, "columns": INT64} | dict.fromkeys(("largest", "scale", "ratio", "base", "slope", "gradients"), FP32),
        {"BLOCK": triton_noised_softmax.BLOCK},
        8,
    ),
}

for kernel, (pointers, constants, num_warps) in KERNELS.items():
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    # Pointers from torch's allocator and even strides, as Triton finds them when it specialises a call.
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()}, aligned)
    binary = triton.compile(source, target=HOPPER, options={"num_warps": num_warps})
    local = [line for line in binary.asm["ptx"].splitlines() if ".local" in line]
    found = {"kernel": kernel.__name__, "bytes": len(binary.asm["cubin"]), "local": local, "target": "sm_90a" in binary.asm["ptx"]}
    print(json.dumps(found))

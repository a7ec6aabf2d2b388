"""The choice of fused kernels, of libraries and of this project, and the reason why a kernel is not used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from megatron.core.models.common.embeddings import rope_utils

from w1train.config.errors import UserError
from w1train.config.schema import KernelsConfig, ModelConfig
from w1train.kernels.rotary import apply_rotary
from w1train.kernels.selection import MAX_ROW, has_triton
from w1train.model.linears import has_transformer_engine
from w1train.runtime.kernel_choices import note_kernel

ExpertProduct = Literal["grouped_mm", "loop"]


@dataclass(frozen=True, slots=True)
class Fusions:
    """The fused kernels that are on."""

    rope: bool
    swiglu: bool
    gradient_accumulation: bool


def choose_fusions(kernels: KernelsConfig, model: ModelConfig, *, on_cuda: bool) -> Fusions:
    """Return the kernels that the configuration asks for and this machine can run.

    Raises:
        UserError: the configuration names a kernel that cannot run here.
    """
    # megatron-core refuses to fuse the rotary embedding if its own import of a fused kernel failed; this project's kernel is put in the
    # place of that import.
    rope = _chosen("rope", kernels.rope, _rope_obstacle(on_cuda))
    if rope:
        rope_utils.fused_apply_rotary_pos_emb = apply_rotary
    return Fusions(
        rope=rope,
        swiglu=_chosen("swiglu", kernels.swiglu, None if on_cuda else "it is compiled for CUDA"),
        gradient_accumulation=_chosen(
            "gradient_accumulation", kernels.gradient_accumulation, _gradient_accumulation_obstacle(model, on_cuda)
        ),
    )


def _chosen(name: str, choice: Literal["auto", "fused", "unfused"], obstacle: str | None) -> bool:
    if choice == "fused" and obstacle is not None:
        raise UserError(f"kernels.{name} is fused, but {obstacle}; set kernels.{name}=auto or unfused")
    fused = choice != "unfused" and obstacle is None
    reason = "" if fused else " (as configured)" if choice == "unfused" else f" ({obstacle})"
    kernel = "fused" if fused else "unfused"
    note_kernel(name, kernel, f"kernels.{name}: {kernel}{reason}")
    return fused


def _rope_obstacle(on_cuda: bool) -> str | None:
    if not on_cuda:
        return "Triton's kernels need CUDA"
    return None if has_triton() else "triton is not installed"


def _gradient_accumulation_obstacle(model: ModelConfig, on_cuda: bool) -> str | None:
    """Return the reason why the matrix product that computes gradients cannot also accumulate them, or None if it can.

    transformer-engine's linears can always do this. megatron-core's linears, and the head, need apex's extension.
    """
    if not on_cuda:
        return "it needs CUDA"
    if find_spec("fused_weight_gradient_mlp_cuda") is None:
        with_te = "; transformer-engine's linears do not suffice, as the head is megatron-core's" if model.transformer_impl == "te" else ""
        return f"apex's fused_weight_gradient_mlp_cuda is not installed{with_te}"
    return None


def choose_expert_product(
    kernels: KernelsConfig, model: ModelConfig, num_tensor_ranks: int, precision: str, *, on_cuda: bool
) -> ExpertProduct:
    """Return how the experts' matrices are multiplied.

    Args:
        num_tensor_ranks: the ranks that share each expert.

    Raises:
        UserError: the configuration asks for the grouped product, which cannot run here.
    """
    obstacle = _grouped_product_obstacle(model, num_tensor_ranks, precision, on_cuda)
    if kernels.experts == "grouped_mm" and obstacle is not None:
        raise UserError(f"kernels.experts is grouped_mm, but {obstacle}; set kernels.experts=auto or loop")
    product: ExpertProduct = "loop" if kernels.experts == "loop" or obstacle is not None else "grouped_mm"
    reason = "" if product == "grouped_mm" else " (as configured)" if kernels.experts == "loop" else f" ({obstacle})"
    note_kernel("experts", product, f"kernels.experts: {product}{reason}")
    return product


def _grouped_product_obstacle(model: ModelConfig, num_tensor_ranks: int, precision: str, on_cuda: bool) -> str | None:
    """Return the reason why torch's grouped product cannot multiply the experts' matrices, or None if it can."""
    multiple = 8 if precision == "bf16" else 4
    sizes = {"model.hidden_size": model.hidden_size, "model.experts.ffn_hidden_size": model.experts.ffn_hidden_size // num_tensor_ranks}
    for key, size in sizes.items():
        if size % multiple:
            share = f" over {num_tensor_ranks} ranks" if key != "model.hidden_size" and num_tensor_ranks > 1 else ""
            return f"it needs rows of a multiple of 16 bytes, and {key}{share} gives rows of {size} numbers of {16 // multiple} bytes"
    if not on_cuda:
        return None
    if precision != "bf16":
        return "on CUDA torch has a kernel for bf16 alone; for others it waits for the GPU and loops itself"
    if (capability := torch.cuda.get_device_capability())[0] not in (9, 10):
        return f"torch has a kernel for compute capability 9 and 10, and this GPU has {capability}"
    return None


def describe_elementwise(kernels: KernelsConfig, hidden_size: int, *, on_cuda: bool) -> None:
    """Log which kernels the modulated norm, the gate and the chunked loss use.

    Raises:
        UserError: ``kernels.elementwise`` is triton, and Triton cannot run here.
    """
    triton = kernels.elementwise != "torch" and on_cuda and has_triton()
    too_wide = f"model.hidden_size is {hidden_size}, and a program holds {MAX_ROW} elements at most" if hidden_size > MAX_ROW else None
    if kernels.elementwise == "triton" and (too_wide or not triton):
        why = "Triton's kernels need CUDA" if not on_cuda else "triton is not installed" if not triton else too_wide
        raise UserError(f"kernels.elementwise is triton, but {why}; set kernels.elementwise=auto or torch")
    if triton and too_wide:
        kernel, reason = "triton in the loss, plain PyTorch in norms and gates", f" ({too_wide})"
    else:
        kernel, reason = "triton" if triton else "plain PyTorch", ""
    note_kernel("elementwise", kernel, f"kernels.elementwise: {kernel}{reason}")


def fp8_settings(fp8: Literal["none", "tensorwise", "blockwise"]) -> dict[str, str | None]:
    """Return the fields of TransformerConfig for ``training.fp8``: E4M3, and for tensorwise scaling E5M2 gradients.

    Raises:
        UserError: transformer-engine is missing, or the GPU does not support this FP8 recipe.
    """
    if fp8 == "none":
        return {"fp8": None}
    if not has_transformer_engine():
        raise UserError(f"training.fp8 is {fp8}, which needs transformer-engine, and it is not installed here; set training.fp8=none")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    needed = (8, 9) if fp8 == "tensorwise" else (9, 0)
    if capability is not None and capability < needed:
        raise UserError(f"training.fp8 is {fp8}, which needs compute capability {needed[0]}.{needed[1]}, and this GPU has {capability}")
    return {"fp8": "hybrid" if fp8 == "tensorwise" else "e4m3", "fp8_recipe": fp8}

"""Checks of kernels against references: relative errors of outputs and gradients, tensor by tensor.

Every attention backend is compared with an explicit softmax in fp32, on packed samples with padding, under every kind of mask. Every
Triton kernel is compared with its PyTorch twin in fp32. In bf16, an error of 1e-2 is allowed. The check of a kernel that cannot run on
this machine has the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from w1train.attention.backends.choice import BACKENDS
from w1train.attention.backends.reference import attend_reference
from w1train.attention.visibility import Visibility, block_diffusion_visibility, causal_visibility, document_visibility
from w1train.config.errors import first_line
from w1train.config.rules.attention_limits import AttentionCase, VisibilityKind
from w1train.kernels.modulation import gate_residual, rms_norm
from w1train.kernels.rotary import apply_rotary
from w1train.kernels.segments import Segments
from w1train.kernels.selection import Implementation, has_triton
from w1train.model.chunked_head import Head, linear_row_terms
from w1train.model.row_terms import CrossEntropy, KlIs, Vocabulary

logger = logging.getLogger(__name__)

TOLERANCE = 1e-2
"""Largest relative error that is allowed in bf16."""
_TENSORS = ("output", "query's gradient", "key's gradient", "value's gradient")


@dataclass(slots=True)
class Check:
    """The check of a kernel on one case."""

    kernel: str
    case: str
    errors: dict[str, float] = field(default_factory=dict)
    """Relative errors by tensor."""
    reason: str | None = None
    """The reason why the kernel did not run; None if it ran."""
    failed: bool = False

    @property
    def passed(self) -> bool:
        """Tell whether no result is wrong. A kernel that cannot run on this machine passes."""
        return not self.failed and all(error <= TOLERANCE for error in self.errors.values())

    def row(self) -> tuple[str, ...]:
        """Return the row of the table."""
        verdict = "not run" if self.reason and not self.failed else "right" if self.passed else "WRONG"
        reason = f": {self.reason}".replace("|", "/") if self.reason else ""
        output, *gradients = (f"{error:.1e}" for error in self.errors.values()) if self.errors else ("",)
        return f"{self.kernel}, {self.case}{reason}", verdict, output, " ".join(gradients)


def attention_checks(device: torch.device, length: int, channels: int) -> Iterator[Check]:
    """Yield the check of every backend, mask and number of key/value heads."""
    for name in BACKENDS:
        if name == "reference":
            continue  # the other backends are compared with it
        for groups in (4, 1):
            for mask, (kind, visibility) in _masks(length, device).items():
                case = AttentionCase(kind, "bf16", 4, groups, channels)
                check = Check(name, f"{mask}, {groups} key/value heads", reason=BACKENDS[name].why_not(case, device))
                if check.reason is None:
                    run_check(check, partial(_attention_errors, name, case, visibility))
                yield check


def _masks(length: int, device: torch.device) -> dict[str, tuple[VisibilityKind, Visibility]]:
    """Return the masks of two samples of unaligned documents, the first of which ends with padding."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.zeros((2, length), dtype=torch.int32)
    starts[:, torch.randint(1, length, (5,), generator=generator)] = 1
    documents = starts.cumsum(1).int()
    documents[0, -length // 16 :] = -1
    documents = documents.to(device)
    masks: dict[str, tuple[VisibilityKind, Visibility]] = {
        "masked diffusion": ("documents", document_visibility(documents)),
        "autoregressive": ("causal", causal_visibility(documents)),
    }
    for size in (1, 4, 32, 64):
        masks[f"blocks of {size}"] = ("blocks", block_diffusion_visibility(documents, size, "document"))
    return masks


def _attention_errors(name: str, case: AttentionCase, visibility: Visibility) -> dict[str, float]:
    _, num_samples, num_rows = visibility.endpoints.shape
    generator = torch.Generator(visibility.endpoints.device).manual_seed(0)
    sizes = [(case.num_heads, num_rows), *[(case.num_groups, visibility.num_keys)] * 2, (case.num_heads, num_rows)]
    query, key, value, upstream = (
        torch.randn((num_samples, *size, case.channels), generator=generator, device=generator.device).bfloat16() for size in sizes
    )
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    backend = BACKENDS[name](case)
    plan = backend.prepare(visibility)
    output = backend.attend(*inputs, plan)
    found = [output, *torch.autograd.grad(output, inputs, upstream)]
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = attend_reference(wide[0], wide[1], wide[2], visibility.dense())
    wanted = [expected, *torch.autograd.grad(expected, wide, upstream.float())]
    return relative_errors(found, wanted)


def kernel_checks(device: torch.device, num_rows: int, size: int, vocabulary: int) -> Iterator[Check]:
    """Yield the check of every Triton kernel of a step."""
    reason = "Triton's kernels need a GPU" if device.type != "cuda" else None if has_triton() else "triton is not installed"
    for name, errors in _KERNELS.items():
        check = Check(name, f"{num_rows} rows of {size}", reason=reason)
        if reason is None:
            run_check(check, partial(errors, device, num_rows, size, vocabulary))
        yield check


def twin_errors(triton: Callable[..., Tensor], twin: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, float]:
    """Return the errors of output and gradients of ``triton`` on bf16 inputs, compared with ``twin`` on the same inputs in fp32."""
    narrow = [tensor.bfloat16().requires_grad_() for tensor in inputs]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    output, expected = triton(*narrow), twin(*wide)
    upstream = torch.randn_like(expected).to(output.dtype)
    found = [output, *torch.autograd.grad(output, narrow, upstream)]
    wanted = [expected.detach(), *torch.autograd.grad(expected, wide, upstream.float())]
    names = ["output", *(f"gradient {number}" for number in range(1, len(inputs) + 1))]
    return {
        name: float((one.detach().float() - other).norm() / other.norm()) for name, one, other in zip(names, found, wanted, strict=True)
    }


def _norm_errors(device: torch.device, num_rows: int, size: int, _vocabulary: int) -> dict[str, float]:
    x, weight, shift, scale = (torch.randn(shape, device=device) for shape in ((num_rows, 1, size), (size,), (3, size), (3, size)))
    segments = Segments(torch.randint(0, 3, (num_rows, 1), device=device))
    triton, twin = (
        lambda *inputs, how=how: rms_norm(inputs[0], inputs[1], 1e-6, inputs[2], inputs[3], segments, how) for how in ("triton", "torch")
    )
    return twin_errors(triton, twin, [x, weight, shift, scale])


def _gate_errors(device: torch.device, num_rows: int, size: int, _vocabulary: int) -> dict[str, float]:
    residual, gate, x = (torch.randn(shape, device=device) for shape in ((num_rows, 1, size), (3, size), (num_rows, 1, size)))
    segments = Segments(torch.randint(0, 3, (num_rows, 1), device=device))
    triton, twin = (lambda *inputs, how=how: gate_residual(inputs[0], inputs[1], inputs[2], segments, how) for how in ("triton", "torch"))
    return twin_errors(triton, twin, [residual, gate, x])


def _rotary_errors(device: torch.device, num_rows: int, _size: int, _vocabulary: int) -> dict[str, float]:
    angles = (4096 * torch.rand((num_rows, 1, 1, 64), device=device)).repeat(1, 1, 1, 2)

    def twin(t: Tensor) -> Tensor:
        first, second = t.chunk(2, dim=-1)
        return t * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    return twin_errors(lambda t: apply_rotary(t, angles), twin, [torch.randn((num_rows, 1, 4, 128), device=device)])


def _loss_errors(device: torch.device, num_rows: int, size: int, vocabulary: int) -> dict[str, float]:
    targets = torch.randint(0, vocabulary, (num_rows,), device=device)
    head = _whole_vocabulary(num_rows, "triton")
    inputs = [torch.randn((num_rows, size), device=device), 0.02 * torch.randn((vocabulary, size), device=device)]
    return twin_errors(
        lambda rows, weight: linear_row_terms(rows, weight, [CrossEntropy(targets)], head)[0],
        lambda rows, weight: torch.nn.functional.cross_entropy(rows @ weight.t(), targets, reduction="none"),
        inputs,
    )


def _noised_loss_errors(device: torch.device, num_rows: int, size: int, vocabulary: int) -> dict[str, float]:
    targets, noised = torch.randint(0, vocabulary, (2, num_rows), device=device)
    alpha = torch.rand(num_rows, device=device)
    term = KlIs(targets, noised, alpha, (1 - alpha) / vocabulary, (1 - alpha) / vocabulary)
    inputs = [torch.randn((num_rows, size), device=device), 0.02 * torch.randn((vocabulary, size), device=device)]

    def compute(how: Implementation, rows: Tensor, weight: Tensor) -> Tensor:
        return linear_row_terms(rows, weight, [term], _whole_vocabulary(num_rows, how))[0]

    return twin_errors(partial(compute, "triton"), partial(compute, "torch"), inputs)


def _whole_vocabulary(num_rows: int, implementation: Implementation) -> Head:
    vocabulary = Vocabulary(group=None, first_token=0, excluded_token=None, implementation=implementation)
    return Head(vocabulary, max(1, num_rows // 3), sum_row_gradients=True)


_KERNELS: dict[str, Callable[[torch.device, int, int, int], dict[str, float]]] = {
    "modulated RMSNorm": _norm_errors,
    "gated residual": _gate_errors,
    "rotary embedding": _rotary_errors,
    "chunked cross-entropy": _loss_errors,
    "chunked KL and IS": _noised_loss_errors,
}


def relative_errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """Return |found - wanted| / |wanted| by tensor, over the heads that ``wanted`` has; NaN counts as infinite."""
    errors = {}
    for name, one, other in zip(_TENSORS, found, wanted, strict=True):
        error = float((one.detach()[:, : other.shape[1]].float() - other.detach()).norm() / other.detach().norm())
        errors[name] = error if error == error else float("inf")
    return errors


def run_check(check: Check, errors: Callable[[], dict[str, float]]) -> None:
    """Set the check's errors, or the reason why there are no errors."""
    try:
        check.errors = errors()
    # A kernel that fails in any way must not hide the results of others. The failure is a row of the table, and sets the exit status.
    except Exception as error:
        logger.exception("%s, %s", check.kernel, check.case)
        check.reason, check.failed = f"failed: {type(error).__name__}: {first_line(error)[:120]}", True

"""Findings about attention backends and kernels: each of those that work on this machine runs forward and backward, and is compared with
its reference."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch

from w1train.diagnosis.findings import Finding, Section
from w1train.diagnosis.kernel_checks import TOLERANCE, Check, attention_checks, kernel_checks


def kernel_section(device: torch.device) -> Section:
    """Return the findings on small cases, which show whether kernels are right and not how fast they are."""
    on_gpu = device.type == "cuda"
    length, channels, sizes = (512, 64, (512, 1024, 4096)) if on_gpu else (128, 16, (64, 32, 96))
    torch.manual_seed(0)
    attention = _by_kernel(attention_checks(device, length, channels))
    for finding in attention:
        finding.name = f"attention.backend={finding.name}"
    return Section(f"kernels on {device.type}, against references", [*attention, *_by_kernel(kernel_checks(device, *sizes))])


def _by_kernel(checks: Iterable[Check]) -> list[Finding]:
    return [summarize(name, of_kernel) for name, of_kernel in groupby(checks, lambda check: check.kernel)]


def summarize(name: str, checks: Iterable[Check]) -> Finding:
    """Return all cases of a kernel as one finding."""
    checks = list(checks)
    wrong = [check for check in checks if not check.passed]
    ran = [check for check in checks if check.errors]
    worst = max((error for check in ran for error in check.errors.values()), default=0.0)
    reasons = list(dict.fromkeys(check.reason for check in checks if check.reason))
    if wrong:
        cases = f"{', '.join(check.case for check in wrong)} (error {worst:.1e})"
        return Finding(name, f"WRONG in {len(wrong)} of {len(checks)} cases", "failed", "; ".join([cases, *reasons]))
    if not ran:
        return Finding(name, "cannot serve", "note", "; ".join(reasons))
    served = f"right in {len(ran)} cases" if len(ran) == len(checks) else f"right in {len(ran)} of {len(checks)} cases"
    return Finding(name, served, "ok", "; ".join([f"largest error {worst:.1e}, {TOLERANCE:g} is allowed", *reasons]))

"""The kernels that this process computes with, and why each of them was chosen.

A choice is logged once, with its reason. The start of a run makes many choices, and gathers them into one line.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_choices: dict[str, tuple[str, str]] = {}
"""(part, kernel) of each choice of this process, by the line that describes the choice."""
_gathered: list[str] | None = None
"""The lines of :func:`kernels_in_one_line`; None outside of it."""


def note_kernel(part: str, kernel: str, line: str) -> None:
    """Note that ``part`` of the model is computed with ``kernel``. ``line`` says the same with the reason, and is logged once."""
    if line in _choices:
        return
    _choices[line] = part, kernel
    if _gathered is None:
        logger.info("%s", line)
    else:
        _gathered.append(line)


@contextmanager
def kernels_in_one_line() -> Iterator[None]:
    """Log the choices that are made inside the block as one line at its end, whether or not an error ends it."""
    global _gathered
    lines: list[str] = []
    _gathered = lines
    try:
        yield
    finally:
        _gathered = None
        if lines:
            logger.info("kernels: %s", " | ".join(lines))


def describe_kernels() -> str:
    """Return all choices of this process without their reasons: "attention sdpa; rope, swiglu unfused"."""
    parts: dict[str, dict[str, None]] = {}
    for part, kernel in _choices.values():
        parts.setdefault(kernel, {})[part] = None
    return "; ".join(f"{', '.join(names)} {kernel}" for kernel, names in parts.items())

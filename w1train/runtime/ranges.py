"""Named ranges of time: the code marks what it does, and a profile listens to the marks.

A marked function is a plain function with one check around it, which costs a few tenths of a microsecond a call while nobody listens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

StepPart = Literal["data", "forward", "backward", "reduce", "optimizer", "validate", "sample", "save"]
"""The parts of a training step, and what may follow a step."""
KernelGroup = Literal["attention", "norm and modulation", "rotary and SwiGLU", "loss and head", "optimizer"]
"""What kernels compute."""

OpenRange = Callable[[str], AbstractContextManager[Any]]
"""A function that opens a range of a name in the records of a listener."""


class Ranges[Name: str]:
    """A decorator of functions whose calls are ranges, for at most one listener at a time."""

    def __init__(self) -> None:
        self._open: OpenRange | None = None

    def __call__[**Arguments, Result](self, name: Name) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
        """Return a decorator that makes each call of a function a range of this name."""

        def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
            @functools.wraps(function)
            def call(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
                open_range = self._open
                if open_range is None:
                    return function(*arguments, **options)
                with open_range(name):
                    return function(*arguments, **options)

            return call

        return decorate

    @contextlib.contextmanager
    def listening(self, open_range: OpenRange) -> Iterator[None]:
        """Call ``open_range`` around each range, in all threads, for as long as this is open."""
        assert self._open is None, "another listener is there already"
        self._open = open_range
        try:
            yield
        finally:
            self._open = None


step_part: Ranges[StepPart] = Ranges()
kernel_group: Ranges[KernelGroup] = Ranges()

"""A kill between two changes of the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class KilledError(BaseException):
    """A stand-in for SIGKILL, which no code of w1train catches."""


def ends_before(fatal_call: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Do the work, but kill it at the ``fatal_call``-th call that renames, flushes or removes a file. Tell whether the work ended before
    this call."""
    num_calls = 0

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls >= fatal_call:
                raise KilledError
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            work()
        except KilledError:
            return False
    return True

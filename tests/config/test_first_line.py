"""The first line of an error's message, for those who show one line."""

from __future__ import annotations

import pytest

from w1train.config.errors import Problem, UserError, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n what went wrong\nat line 3"), "what went wrong"),
        (OSError(28, "No space left"), "[Errno 28] No space left"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RuntimeError(" \n"), "RuntimeError"),
        (UserError("s3://a:secret@host is gone\nand more"), "s3://a:***@host is gone"),
        (RuntimeError(Problem("model.x", "1", "2")), "model.x"),
    ],
)
def test_the_first_line(error, line):
    assert first_line(error) == line

"""The choices of kernels: each is logged once, and those of a start are one line."""

from __future__ import annotations

import logging

import pytest

from w1train.runtime import kernel_choices
from w1train.runtime.kernel_choices import describe_kernels, kernels_in_one_line, note_kernel


@pytest.fixture(autouse=True)
def no_choices(monkeypatch, caplog):
    monkeypatch.setattr(kernel_choices, "_choices", {})
    caplog.set_level(logging.INFO)


def test_the_choices_of_a_start_are_one_line(caplog):
    with kernels_in_one_line():
        note_kernel("attention", "sdpa", "attention: sdpa; not flex: it needs a GPU")
        note_kernel("rope", "unfused", "rope: unfused (no CUDA)")
        note_kernel("rope", "unfused", "rope: unfused (no CUDA)")
        note_kernel("swiglu", "unfused", "swiglu: unfused")
        assert caplog.messages == []
    assert caplog.messages == ["kernels: attention: sdpa; not flex: it needs a GPU | rope: unfused (no CUDA) | swiglu: unfused"]
    assert describe_kernels() == "attention sdpa; rope, swiglu unfused"
    with kernels_in_one_line():
        pass
    assert len(caplog.messages) == 1


def test_a_later_choice_is_a_line_of_its_own(caplog):
    for _ in range(2):
        note_kernel("attention", "flex", "attention of sampling: flex")
    assert caplog.messages == ["attention of sampling: flex"]


def test_an_error_does_not_hide_the_choices_before_it(caplog):
    def start() -> None:
        with kernels_in_one_line():
            note_kernel("attention", "sdpa", "attention: sdpa")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        start()
    assert caplog.messages == ["kernels: attention: sdpa"]

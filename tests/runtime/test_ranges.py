"""Ranges open around marked functions for a listener, and are nothing without one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import pytest

from w1train.runtime.ranges import Ranges


@pytest.fixture
def ranges() -> Ranges:
    return Ranges()


class Listener:
    def __init__(self) -> None:
        self.heard: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.heard.append(f"{name} begins")
        try:
            yield
        finally:
            self.heard.append(f"{name} ends")


def test_a_marked_function_is_the_function(ranges):
    @ranges("forward")
    def add(a: int, *, b: int = 1) -> int:
        """Add."""
        return a + b

    listener = Listener()
    assert add(1, b=2) == 3
    with ranges.listening(listener):
        assert add(1) == 2
        assert listener.heard == ["forward begins", "forward ends"]
    assert add(5) == 6
    assert len(listener.heard) == 2, "after the listener has gone"
    assert (add.__name__, add.__doc__, list(inspect.signature(add).parameters)) == ("add", "Add.", ["a", "b"])


def test_ranges_nest_and_end_with_an_error(ranges):
    listener = Listener()

    @ranges("backward")
    def fail() -> None:
        raise ZeroDivisionError

    with ranges.listening(listener), pytest.raises(ZeroDivisionError):
        ranges("data")(fail)()
    assert listener.heard == ["data begins", "backward begins", "backward ends", "data ends"]


def test_a_method_is_marked_for_all_objects(ranges):
    class Model:
        def __init__(self, size: int) -> None:
            self.size = size

        @ranges("forward")
        def forward(self, x: int) -> int:
            return self.size * x

    listener = Listener()
    with ranges.listening(listener):
        assert [Model(2).forward(3), Model(5).forward(x=7)] == [6, 35]
    assert len(listener.heard) == 4


def test_there_is_one_listener_at_a_time(ranges):
    with ranges.listening(Listener()), pytest.raises(AssertionError, match="another listener"), ranges.listening(Listener()):
        pass
    with ranges.listening(Listener()):
        pass


def test_kinds_do_not_hear_each_other(ranges):
    listener = Listener()
    with ranges.listening(listener):
        Ranges()("optimizer")(lambda: None)()
    assert listener.heard == []

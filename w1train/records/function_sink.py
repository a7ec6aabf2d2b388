"""A function of the caller as a sink."""

from __future__ import annotations

from collections.abc import Callable

from w1train.records.sink import Record, Sink


def function_sink(function: Callable[[Record], None]) -> type[Sink]:
    """Return the sink that calls a function with a copy of each record of metrics.jsonl. An exception of the function ends the run."""

    class FunctionSink(Sink):
        """The sink of the function."""

        def record(self, record: Record) -> None:
            function(dict(record))

    return FunctionSink

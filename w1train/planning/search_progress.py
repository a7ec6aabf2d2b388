"""The progress of a search on standard error: a bar on a terminal, lines elsewhere, both with the rate and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from w1train.runtime.quantities import duration

FIRST_SECONDS = 3.0
"""Seconds after which a search shows its progress."""
_LINE_SECONDS = 10.0
"""Seconds between two lines."""


def with_progress[Item](layouts: Sequence[Item], console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[Item]:
    """Yield the layouts, and show on the console how many of them are done. A search that ends soon shows nothing."""
    columns = TextColumn("search"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task = bar.add_task("search", total=len(layouts), rate="")
    began = clock()
    due = began + FIRST_SECONDS
    try:
        for num_done, layout in enumerate(layouts):
            now = clock()
            if now >= due and num_done:
                rate = num_done / (now - began)
                if console.is_terminal:
                    bar.start()
                    bar.update(task, completed=num_done, rate=f"{rate:.1f} layouts/s")
                else:
                    left = duration((len(layouts) - num_done) / rate)
                    console.print(f"search: {num_done} of {len(layouts)} layouts, {rate:.1f} layouts/s, {left} left")
                    due = now + _LINE_SECONDS
            yield layout
    finally:
        bar.stop()

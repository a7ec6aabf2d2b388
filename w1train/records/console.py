"""What a person watching the run sees: a live bar on a terminal, aligned lines in a log file."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from w1train.records.sample_text import continuation, shorten, visible_masks
from w1train.runtime.quantities import duration, quantity

logger = logging.getLogger(__name__)

_SAMPLE_CHARACTERS = 240


class TrainingConsole:
    """Progress of one run, for rank 0; with ``enabled=False`` it is silent, so that other ranks run the same code.

    >>> with TrainingConsole(total_tokens=1 << 30, total_steps=4000, start_step=0, enabled=rank == 0, interval=10) as console:
    ...     console.print_header("demo", {"model": "12.6M parameters", "device": "2 x cpu"})
    ...     console.update(train_record)
    """

    def __init__(
        self,
        total_tokens: int,
        total_steps: int,
        start_step: int,
        enabled: bool,
        interval: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``start_step`` steps are done already (a resumed run); ``interval`` steps lie between two plain lines."""
        self.total_tokens, self.total_steps, self.interval = total_tokens, total_steps, interval
        self.enabled = enabled
        self._console = _Console(file=stream, highlight=False, markup=False)
        # A log file has no width to fill: rich would break its lines at 80 characters.
        self._console.soft_wrap = not self._console.is_terminal
        self.live = enabled and self._console.is_terminal
        self._eta = _RemainingTime(total_steps, clock)
        self._metrics_line = Text("waiting for the first step", style="dim")
        self._progress = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[times]}", style="dim"),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, times="")
        self._display = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
        self._shown = ExitStack()

    def __enter__(self) -> TrainingConsole:
        if self.live:
            self._shown.enter_context(_shown(self._display))
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def print_header(self, title: str, rows: Mapping[str, object]) -> None:
        """What is about to be trained: a table of titles and values (model size, device, world, tokens, batch)."""
        width = max(map(len, rows), default=0)
        self._print(Text(title, style="bold"))
        for name, value in rows.items():
            self._print(Text.assemble((f"  {name:<{width}}  ", "dim"), str(value)))
        self._print(Text())

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a training record of metrics.jsonl (one a step)."""
        step = record["step"]
        self._eta.step_done(step)
        if not self.enabled:
            return
        if self.live:
            tokens = f"{quantity(record['tokens'])} / {quantity(self.total_tokens)} tokens"
            self._metrics_line = Text(fitted([*_parts(record), *_places(record), (6, tokens)], self._console.width))
            self._progress.update(self._task, completed=step, times=self._eta.describe())
        elif step % self.interval == 0 or step == self.total_steps:
            width = len(f"{self.total_steps:,}")
            places = [text for _, text in _places(record)] if "stage" in record else []
            columns = [f"step {step:>{width},}/{self.total_steps:,}", *describe(record), self._eta.describe(), *places]
            self._print(Text("  ".join(columns)))

    def print_line(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._print(Text(text))

    def print_validation(self, record: Mapping[str, Any]) -> None:
        """Show a validation record of metrics.jsonl."""
        parts = [f"validation at step {record['step']:,}:", *describe(record), f"({record['time/seconds']:.1f} s)"]
        self.print_line("  ".join(parts))

    def print_sample(self, record: Mapping[str, Any]) -> None:
        """Show a record of samples.jsonl: the prompt in bold, every token still masked as a shaded block, shortened."""
        text = Text(f"sample at step {record['step']:,}: ")
        text.append(_one_line(record["prompt"]), style="bold")
        text.append(_one_line(continuation(record)), style="cyan")
        self._print(text)

    def _print(self, text: Text) -> None:
        if not self.enabled:
            return
        # Training does not die of a terminal that cannot show a character.
        text.plain = text.plain.encode(self._console.encoding, "replace").decode(self._console.encoding)
        try:
            self._console.print(text)
        except OSError as error:
            # The terminal is gone, the pipe closed, the log file's disk full: the records are elsewhere.
            self.enabled = False
            logger.warning("standard output takes no more (%s): training goes on without it", error)

    def _render(self) -> Group:
        return Group(self._progress, self._metrics_line)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich's own would end the process, without a word."""
        raise  # called where the BrokenPipeError is caught


class _RemainingTime:
    """Wall-clock time since the start, and until the end at the pace so far (validation and checkpoints included).

    The pace counts from the end of the first step, which is slower than the rest (compilation, caches, allocator).
    """

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._start = clock()
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def step_done(self, step: int) -> None:
        self._last = (step, self._clock())
        self._first = self._first or self._last

    def remaining(self) -> float | None:
        """Seconds; None until two steps are done."""
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return None
        (first_step, first_time), (step, now) = self._first, self._last
        return (now - first_time) / (step - first_step) * (self._total_steps - step)

    def describe(self) -> str:
        remaining = self.remaining()
        eta = "--:--" if remaining is None else duration(remaining)
        return f"{duration(self._clock() - self._start)} elapsed  {eta} left"


_Part = tuple[int, str]
"""(how soon it is left out where there is little room: the smallest last, a few words)."""


def describe(record: Mapping[str, Any]) -> list[str]:
    """The numbers of a record worth watching, each with its unit, of a constant width."""
    return [text for _, text in _parts(record)]


def _parts(record: Mapping[str, Any]) -> list[_Part]:
    parts = []
    if "loss" in record:
        parts.append((0, f"loss {record['loss']:7.4f}"))
    parts.append((7, f"ELBO {record['elbo']:7.4f} nats/token"))
    if record.get("elbo_bits_per_byte") is not None:
        parts.append((4, f"{record['elbo_bits_per_byte']:6.4f} bits/byte"))
    if "learning_rate" in record:
        parts.append((8, f"lr {record['learning_rate']:.2e}"))
    if record.get("grad_norm") is not None:
        parts.append((9, f"grad {record['grad_norm']:7.3g}"))
    if record.get("time/tokens_per_second") is not None:
        parts.append((1, f"{quantity(record['time/tokens_per_second']):>6} tokens/s"))
    if record.get("time/mfu") is not None:
        parts.append((2, f"MFU {record['time/mfu']:6.1%}"))
    return parts


def _places(record: Mapping[str, Any]) -> list[_Part]:
    """Where the run is in its schedule and in its data."""
    places = []
    if "stage" in record:
        places.append((3, f"stage {record['stage']}"))
    if record.get("epoch") is not None:
        places.append((5, f"epoch {record['epoch']:.2f}"))
    return places


def fitted(parts: Sequence[_Part], width: int) -> str:
    """As many of the parts as one line of a terminal has room for: a line that is broken in two makes the display jump."""
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return "  ".join(text for _, text in kept)


def _one_line(text: str) -> str:
    """Shortened; masks and line breaks shown as one sign each: a sample is one line."""
    return visible_masks(shorten(text, _SAMPLE_CHARACTERS)).replace("\n", "\u23ce")


@contextmanager
def _shown(display: Live) -> Iterator[None]:
    """Show the display, with log lines above it.

    rich replaces sys.stdout and sys.stderr by streams that print above the bar; a log handler that was made before holds the
    old ones and would write into the middle of it.
    """
    before = (sys.stdout, sys.stderr)
    with display:
        replaced = dict(zip(before, (sys.stdout, sys.stderr), strict=True))
        held = [(handler, handler.stream) for handler in _stream_handlers() if handler.stream in before]
        for handler, stream in held:
            handler.setStream(replaced[stream])
        try:
            yield
        finally:
            for handler, stream in held:
                handler.setStream(stream)


def _stream_handlers() -> list[logging.StreamHandler]:
    loggers = [logging.getLogger(), *(item for item in logging.Logger.manager.loggerDict.values() if isinstance(item, logging.Logger))]
    return [handler for each in loggers for handler in each.handlers if type(handler) is logging.StreamHandler]

"""The console: a live bar on a terminal, aligned lines in a log file."""

from __future__ import annotations

import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from w1train.records.average_comparison import comparison_lines
from w1train.records.sample_text import continuation, shorten, visible_masks
from w1train.records.sink import Record, RecordedRun, Sink
from w1train.runtime.quantities import duration, quantity

logger = logging.getLogger(__name__)

_SAMPLE_CHARACTERS = 240
_FEWEST_COLUMNS = 20


class ConsoleSink(Sink):
    """The sink that shows the progress of a run to people."""

    def __init__(self, run: RecordedRun, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._is_broken = run, False
        self._console = _console(stream)
        self._eta = _RemainingTime(run.num_steps, clock)
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
        self._task = self._progress.add_task("train", total=run.num_steps, completed=run.step, times="")
        self._display = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
        self._shown = ExitStack()

    def start(self) -> None:
        """Show the bar, if this is a terminal, and print what is about to be trained."""
        if self._console.is_terminal:
            self._shown.enter_context(_shown(self._display))
        for line in _block(self._run.config.name, self._run.description, self._console):
            self._print(line)
        self._print(Text())

    def close(self, *, failed: bool) -> None:
        """Take the bar away."""
        self._shown.close()

    def record(self, record: Record) -> None:
        """Show a step in the bar, or as a line if it is due; print a validation and an average."""
        match record["kind"]:
            case "train":
                self._show_step(record)
            case "validation":
                parts = [f"validation at step {record['step']:,}:", *describe(record), f"({record['time/seconds']:.1f} s)"]
                self._print(Text("  ".join(parts)))
            case "average":
                for line in comparison_lines(record):
                    self._print(Text(line))

    def record_samples(self, samples: Sequence[Record]) -> None:
        """Print each sample: the prompt in bold, every token that is still masked as a shaded block, shortened."""
        for sample in samples:
            text = Text(f"sample at step {sample['step']:,}: ")
            text.append(_one_line(sample["prompt"]), style="bold")
            text.append(_one_line(continuation(sample)), style="cyan")
            self._print(text)

    def _show_step(self, record: Record) -> None:
        step, num_steps = record["step"], self._run.num_steps
        self._eta.step_done(step)
        if self._is_broken:
            return
        if self._console.is_terminal:
            tokens = f"{quantity(record['tokens'])} / {quantity(self._run.num_tokens)} tokens"
            self._metrics_line = Text(fitted([*_parts(record), *_places(record), (6, tokens)], self._console.width))
            self._progress.update(self._task, completed=step, times=self._eta.describe())
        elif step % self._run.config.logging.interval == 0 or step == num_steps:
            width = len(f"{num_steps:,}")
            places = [text for _, text in _places(record)] if "stage" in record else []
            columns = [f"step {step:>{width},}/{num_steps:,}", *describe(record), self._eta.describe(), *places]
            self._print(Text("  ".join(columns)))

    def _print(self, text: Text) -> None:
        if self._is_broken:
            return
        try:
            self._console.print(_shown_text(text, self._console))
        except OSError as error:
            # The terminal is gone, the pipe is closed, or the log file's disk is full. The other sinks have the records.
            self._is_broken = True
            logger.warning("standard output accepts no more text (%s): training continues without it", error)

    def _render(self) -> Group:
        return Group(self._progress, self._metrics_line)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError again, which rich handles when it calls this. rich's own method ends the process silently."""
        raise


def _console(stream: TextIO | None) -> Console:
    console = _Console(file=stream, highlight=False, markup=False)
    # A log file has no width: rich would break its lines at 80 characters.
    console.soft_wrap = not console.is_terminal
    return console


def print_block(title: str, rows: Mapping[str, str], stream: TextIO | None = None) -> None:
    """Print a title, and below it names with their values. Text that standard output does not accept any more is dropped with a warning."""
    console = _console(stream)
    try:
        for line in (Text(), *_block(title, rows, console)):
            console.print(_shown_text(line, console))
    except OSError as error:
        logger.warning("standard output accepts no more text (%s): %s", error, title)


def _block(title: str, rows: Mapping[str, str], console: Console) -> Iterator[Text]:
    """Yield the lines of a title and its rows. On a terminal, values that are too long continue below their beginning."""
    yield Text(title, style="bold")
    width = max(map(len, rows), default=0)
    most = max(_FEWEST_COLUMNS, console.width - width - 4) if console.is_terminal else sys.maxsize
    for name, value in rows.items():
        parts = [textwrap.wrap(line, most, break_long_words=False, break_on_hyphens=False) for line in value.split("\n")]
        first, *others = [line for part in parts for line in part] or [""]
        yield Text.assemble((f"  {name:<{width}}  ", "dim"), first)
        yield from (Text(" " * (width + 4) + line) for line in others)


def _shown_text(text: Text, console: Console) -> Text:
    """Return a text whose every character the console can show: any other character would end training."""
    text.plain = text.plain.encode(console.encoding, "replace").decode(console.encoding)
    return text


class _RemainingTime:
    """The wall-clock time since the start, and the time until the end if the run keeps its pace, which includes validation and checkpoints.

    The pace is measured from the end of the first step, which is slower than the others (compilation, caches, allocator).
    """

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total_steps, self._clock = total_steps, clock
        self._start = clock()
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def step_done(self, step: int) -> None:
        """Note that a step is done now."""
        self._last = (step, self._clock())
        self._first = self._first or self._last

    def remaining(self) -> float | None:
        """Return seconds until the end; None until two steps are done."""
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return None
        (first_step, first_time), (step, now) = self._first, self._last
        return (now - first_time) / (step - first_step) * (self._total_steps - step)

    def describe(self) -> str:
        """Return both times in words."""
        remaining = self.remaining()
        eta = "--:--" if remaining is None else duration(remaining)
        return f"{duration(self._clock() - self._start)} elapsed  {eta} left"


_Part = tuple[int, str]
"""(rank, text) of a part of a line. Where a line is too long, the part with the highest rank is left out first."""


def describe(record: Mapping[str, Any]) -> list[str]:
    """Return the most important numbers of a record, each with its unit, of a constant width."""
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
    """Return the stage of the run, and its epoch."""
    places = []
    if "stage" in record:
        places.append((3, f"stage {record['stage']}"))
    if record.get("epoch") is not None:
        places.append((5, f"epoch {record['epoch']:.2f}"))
    return places


def fitted(parts: Sequence[_Part], width: int) -> str:
    """Join as many parts as fit into one line of a terminal. A line that is broken in two would make the display jump."""
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept))
    return "  ".join(text for _, text in kept)


def _one_line(text: str) -> str:
    """Return a text as one shortened line, with one sign for each mask and each line break."""
    return visible_masks(shorten(text, _SAMPLE_CHARACTERS)).replace("\n", "\u23ce")


@contextmanager
def _shown(display: Live) -> Iterator[None]:
    """Show the display, with log lines above it.

    rich replaces sys.stdout and sys.stderr by streams that print above the bar. A log handler that was made before has the old streams, and
    would write into the middle of the bar.
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

"""The display of sampling on a terminal: the finished texts, and the canvas while it is denoised."""

from __future__ import annotations

from itertools import groupby
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from w1train.sampling.canvas import DenoisingStep
from w1train.sampling.text import TextSample, TextTokenizer

PROMPT_STYLE = "bold cyan"
OPEN_STYLE = "dim"
OPEN_GLYPH = "\N{LIGHT SHADE}"
REVISED_STYLE = "bold yellow"
REVISED_MARKS = ("\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
"""The marks around tokens that a step has changed, where text has no style."""

# Byte-level models generate control bytes, most of all early in training. Printed unchanged, these move the cursor or change colours.
_CONTROL_CHARACTERS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Return the text with control characters replaced, except newline and tab."""
    return text.translate(_CONTROL_CHARACTERS)


def print_samples(console: Console, samples: list[TextSample]) -> None:
    """Print each prompt with its completion and suffix, and a blank line between samples. If the output is not a terminal, no character is
    changed."""
    for place, sample in enumerate(samples):
        if place > 0:
            console.print()
        if console.is_terminal:
            given = [(visible(text), PROMPT_STYLE) for text in (sample.prompt, sample.suffix)]
            console.print(Text.assemble(given[0], visible(sample.text), given[1]), soft_wrap=True)
        else:  # without rich, which would wrap lines and expand tabs
            print(sample, file=console.file)


class DenoisingView:
    """A drawing of the canvas of each step, to be passed as ``on_step``: in place on a terminal, one below the other elsewhere.

    It is a context manager. On a terminal the drawing disappears at its end, before the finished texts are printed.
    """

    def __init__(self, console: Console, tokenizer: TextTokenizer) -> None:
        self._console = console
        self._tokenizer = tokenizer
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> DenoisingView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, state: DenoisingStep) -> None:
        of = "" if state.num_steps is None else f"/{state.num_steps}"
        heading = Text(f"step {state.step}{of}  t = {state.t:.3f}", style="bold")
        canvases = draw_canvases(state, self._tokenizer, with_marks=self._live is None)
        if self._live is not None:
            lines: list[RenderableType] = [heading, *canvases]
            self._live.update(Group(*lines), refresh=True)
        else:
            for line in (heading, *canvases):
                self._console.print(line, soft_wrap=True)


def draw_canvases(state: DenoisingStep, tokenizer: TextTokenizer, *, with_marks: bool = True) -> list[Text]:
    """Draw each row of a batch after a step.

    Args:
        with_marks: put marks around tokens that the step has changed. They have a style without marks too.
    """
    marks = REVISED_MARKS if with_marks else ("", "")
    rows = zip(state.tokens.tolist(), state.is_open.tolist(), state.is_revised.tolist(), strict=True)
    return [_draw(*row, tokenizer, (state.start, state.end), marks) for row in rows]


def _draw(
    tokens: list[int],
    is_open: list[bool],
    is_revised: list[bool],
    tokenizer: TextTokenizer,
    generated: tuple[int, int],
    marks: tuple[str, str],
) -> Text:
    """Draw one row: the prompt, tokens as text, each open position as a faint block, and the suffix.

    Args:
        generated: first generated position, and first position after the generated positions.
    """
    start, end = generated
    drawing = Text.assemble((visible(tokenizer.decode(tokens[:start])), PROMPT_STYLE))
    places = zip(tokens[start:end], is_open[start:end], is_revised[start:end], strict=True)
    for (run_is_open, run_is_revised), run in groupby(places, lambda place: place[1:]):
        run_tokens = [token for token, *_ in run]
        if run_is_open:
            drawing.append(OPEN_GLYPH * len(run_tokens), style=OPEN_STYLE)
            continue
        # Noise may put ids that are not the tokenizer's.
        text = visible(tokenizer.decode([token for token in run_tokens if token < tokenizer.vocab_size]))
        drawing.append(marks[0] + text + marks[1] if run_is_revised else text, style=REVISED_STYLE if run_is_revised else "")
    return drawing.append(visible(tokenizer.decode(tokens[end:])), style=PROMPT_STYLE)

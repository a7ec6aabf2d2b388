"""What a person sees of sampling: the finished texts, and the canvas while it is denoised."""

from __future__ import annotations

from itertools import groupby
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from w1train.sampling.denoise import DenoisingStep
from w1train.sampling.text import TextSample, TextTokenizer

PROMPT_STYLE = "bold cyan"
MASK_STYLE = "dim"
MASK_GLYPH = "\N{LIGHT SHADE}"

# Byte-level models write control bytes, above all early in training; raw, they move the cursor or recolour the terminal.
_CONTROL_CHARACTERS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """The text with control characters (but newline and tab) replaced."""
    return text.translate(_CONTROL_CHARACTERS)


def print_samples(console: Console, samples: list[TextSample]) -> None:
    """Each prompt with its completion, a blank line between samples; character by character unless on a terminal."""
    for place, sample in enumerate(samples):
        if place > 0:
            console.print()
        if console.is_terminal:
            console.print(Text.assemble((visible(sample.prompt), PROMPT_STYLE), visible(sample.text)), soft_wrap=True)
        else:  # not through rich, which would wrap lines and expand tabs
            print(sample.prompt + sample.text, file=console.file)


class DenoisingView:
    """Draws each step's canvas: in place on a terminal, one after the other elsewhere. Give it to ``on_step``.

    A context manager; a drawing on a terminal disappears at the end, to make room for the finished texts.
    """

    def __init__(self, console: Console, tokenizer: TextTokenizer, mask_token_id: int, num_tokens: int) -> None:
        self._console = console
        self._tokenizer = tokenizer
        self._mask_token_id = mask_token_id
        self._num_tokens = num_tokens
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
        canvases = [self.canvas(row) for row in state.tokens.tolist()]
        if self._live is not None:
            lines: list[RenderableType] = [heading, *canvases]
            self._live.update(Group(*lines), refresh=True)
        else:
            for line in (heading, *canvases):
                self._console.print(line, soft_wrap=True)

    def canvas(self, tokens: list[int]) -> Text:
        """One row: the prompt, decided tokens as text, each mask as a faint block."""
        prompt, generated = tokens[: -self._num_tokens], tokens[-self._num_tokens :]
        drawing = Text.assemble((visible(self._tokenizer.decode(prompt)), PROMPT_STYLE))
        for is_mask, run in groupby(generated, lambda token: token == self._mask_token_id):
            run_tokens = list(run)
            if is_mask:
                drawing.append(MASK_GLYPH * len(run_tokens), style=MASK_STYLE)
            else:
                drawing.append(visible(self._tokenizer.decode(run_tokens)))
        return drawing

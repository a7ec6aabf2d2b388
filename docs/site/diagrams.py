"""The diagrams of docs/concepts.md, drawn from the code that they explain.

    python -m docs.site.diagrams    # writes docs/pictures/*.svg again

The masks of attention are those of w1train/attention/visibility.py, and the block sizes those of recipes/schedule/llada2.yaml. A test
compares the files with what this module draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from w1train.attention.visibility import Visibility, block_diffusion_visibility, causal_visibility, document_visibility
from w1train.config.compose import load_config

PICTURES = Path(__file__).resolve().parent.parent / "pictures"
CELL = 18
# A picture has its own background, because a page may be dark while the system is light.
STYLE = """.page{fill:#fff}text{font:13px sans-serif;fill:#24292f}.small{font-size:11px}.bold{font-weight:bold}
.mono{font-family:monospace;font-size:14px}
.line{stroke:#8c959f;fill:none}.clean{fill:#4c6fbf}.noisy{fill:#d9822b}.empty{fill:#8c959f;fill-opacity:.15}.mask{fill:#d9822b;fill-opacity:.35}
@media (prefers-color-scheme:dark){.page{fill:#1e2129}text{fill:#e6edf3}.clean{fill:#7c9be8}.noisy{fill:#f0a65a}}"""
MASK = "\N{MEDIUM SHADE}"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return words of an SVG."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a rectangle of an SVG."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" class="{kind}"/>'


def picture(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """Return an SVG with these parts. The title is what a screen reader reads."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    head = [opening, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", box(0, 0, width, height, "page")]
    return "\n".join([*head, *parts, "</svg>\n"])


def mask_grid(x: float, y: float, title: str, visibility: Visibility, num_noisy: int) -> list[str]:
    """Return a grid with a row for each query and a column for each key. Keys of the noisy stream have another color than clean keys."""
    parts = [text(x, y - 10, title, "bold")]
    for row, keys in enumerate(visibility.dense()[0].tolist()):
        for column, visible in enumerate(keys):
            kind = ("noisy" if column < num_noisy else "clean") if visible else "empty"
            parts.append(box(x + column * CELL, y + row * CELL, CELL - 2, CELL - 2, kind))
    return parts


def visibility_picture() -> str:
    """Return the masks of the three objectives, for a sample of two documents with 5 and 3 tokens, and blocks of 2 tokens."""
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    length = documents.shape[1]
    blocks = block_diffusion_visibility(documents, block_size=2, block_index="document")
    top, gap = 44, 60
    left = 16
    parts = mask_grid(left, top, "autoregressive", causal_visibility(documents), 0)
    left += length * CELL + gap
    parts += mask_grid(left, top, "masked diffusion", document_visibility(documents), length)
    left += length * CELL + gap
    parts += mask_grid(left, top, "block diffusion, blocks of 2", blocks, length)
    bottom = top + 2 * length * CELL
    middle = left + length * CELL
    parts += [
        text(left, bottom + 14, "keys of x_t (noisy)", "small"),
        text(middle, bottom + 14, "keys of x_0 (clean)", "small"),
        text(middle + length * CELL + 6, top + length * CELL / 2, "rows of x_t", "small"),
        text(middle + length * CELL + 6, top + length * CELL * 1.5, "rows of x_0", "small"),
        text(16, bottom - 26, "A row is a token that attends, and a column is a token", "small"),
        text(16, bottom - 10, "that it sees. The sample has two documents, of 5 and 3 tokens.", "small"),
    ]
    return picture(middle + length * CELL + 80, bottom + 24, "Which tokens see which tokens, under three objectives", parts)


def denoising_picture() -> str:
    """Return the same text under masked diffusion and under block diffusion, step by step."""
    masked = ["▒▒▒▒▒▒▒▒▒▒▒▒", "d▒▒ ▒▒▒▒(▒▒▒", "d▒f m▒▒n(▒▒:", "def ma▒n()▒:", "def main(): "]
    blocks = ["▒▒▒▒        ", "def         ", "def ▒▒▒▒    ", "def main    ", "def main▒▒▒▒", "def main(): "]
    parts = [text(16, 24, "masked diffusion: any token, in any order", "bold"), text(316, 24, "block diffusion: block by block", "bold")]
    for left, states in ((16, masked), (316, blocks)):
        for row, state in enumerate(states):
            parts += _tokens(left, 40 + row * 24, state)
    return picture(600, 40 + len(blocks) * 24 + 8, "A text while it is denoised", parts)


def _tokens(left: float, top: float, state: str) -> list[str]:
    parts = []
    for column, character in enumerate(state):
        x = left + column * 21
        parts.append(box(x, top, 19, 20, "mask" if character == MASK else "empty"))
        if character not in (MASK, " "):
            parts.append(text(x + 9.5, top + 15, character, "mono", "middle"))
    return parts


def schedule_picture() -> str:
    """Return the block size and the tokens of each stage of LLaDA2.0's schedule. Heights are logarithms of the block size."""
    config = load_config(["recipe=llada2_w1_4b"])
    stages = list(config.schedule.stages.items())
    parts, left, bottom = [text(16, 24, "recipe=llada2_w1_4b: the block size of each stage, and its tokens in billions", "bold")], 16.0, 200
    for _, stage in stages:
        changes = stage.diffusion
        autoregressive = changes.get("objective") == "autoregressive"
        size = 1 if autoregressive else changes["block_size"]
        height, width = 14 + 10 * (size.bit_length() - 1), 46
        parts += [
            box(left, bottom - height, width, height, "clean" if autoregressive else "noisy"),
            text(left + width / 2, bottom - height - 5, "AR" if autoregressive else f"{size:,}", "small", "middle"),
            text(left + width / 2, bottom + 16, f"{stage.tokens / 1e9:g}", "small", "middle"),
        ]
        left += width + 6
    return picture(left + 10, bottom + 28, "Block sizes of the stages of LLaDA2.0's schedule", parts)


def layout_picture() -> str:
    """Return eight ranks with tensor parallelism of 2, pipeline parallelism of 2 and data parallelism of 2."""
    parts = [text(16, 24, "8 ranks: parallel.tensor=2 parallel.pipeline=2, and so 2 data-parallel replicas", "bold")]
    for replica in range(2):
        left = 16 + replica * 300
        parts += [text(left, 52, f"replica {replica}: half of each batch", "small")]
        for stage in range(2):
            top = 62 + stage * 74
            parts += [text(left, top + 14, f"pipeline stage {stage}: {'first' if stage == 0 else 'last'} half of the layers", "small")]
            for half in range(2):
                rank = half + 2 * replica + 4 * stage
                parts += [
                    box(left + half * 130, top + 20, 122, 36, "clean" if stage == 0 else "noisy"),
                    text(left + half * 130 + 61, top + 43, f"rank {rank}: half {half} of each matrix", "small", "middle"),
                ]
    return picture(610, 222, "The ranks of one layout", parts)


DIAGRAMS: dict[str, Callable[[], str]] = {
    "visibility.svg": visibility_picture,
    "denoising.svg": denoising_picture,
    "schedule.svg": schedule_picture,
    "layout.svg": layout_picture,
}


def main() -> None:
    """Write all diagrams."""
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DIAGRAMS.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

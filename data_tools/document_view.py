"""Documents as people read them: their text, and which of it is a prompt, may be noised, or is fill."""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import groupby, takewhile
from typing import Literal, NamedTuple

import numpy as np

from w1train.data.dataset import TokenDataset
from w1train.data.tokenizer import Tokenizer

Kind = Literal["clean", "noised", "fill"]
_MEANINGS: dict[Kind, str] = {"clean": "stays clean", "noised": "may be noised", "fill": "fill: EOS or <pad> after the end"}
_COLORS: dict[Kind, str] = {"clean": "\x1b[36m", "noised": "\x1b[1;32m", "fill": "\x1b[2m"}
_BRACKETS: dict[Kind, tuple[str, str]] = {"clean": ("", ""), "noised": ("[[", "]]"), "fill": ("((", "))")}
"""Signs around a part where there are no colors, such as in a file."""
STYLE = ".clean{color:#07758a}.noised{background:#d9f2d9}.fill{color:#999}"
"""The style of the parts on a page."""


class Part(NamedTuple):
    """A part of a document's text."""

    text: str
    kind: Kind | None
    """Treatment of the tokens of the part in training; None in a dataset that does not limit the noise."""


class DocumentView(NamedTuple):
    """A document to show."""

    title: str
    parts: list[Part]

    def for_terminal(self, has_colors: bool) -> str:
        """Return the title and the text, with colors or brackets."""
        texts = []
        for text, kind in self.parts:
            if kind is None:
                texts.append(text)
            elif has_colors:
                texts.append(f"{_COLORS[kind]}{text}\x1b[0m")
            else:
                texts.append(text.join(_BRACKETS[kind]))
        return f"--- {self.title}\n{''.join(texts)}\n"

    def for_page(self) -> str:
        """Return HTML."""
        texts = [html.escape(text) if kind is None else f'<span class="{kind}">{html.escape(text)}</span>' for text, kind in self.parts]
        return f"<h3>{html.escape(self.title)}</h3><pre>{''.join(texts)}</pre>"


def draw_views(dataset: TokenDataset, tokenizer: Tokenizer, num: int, num_characters: int, seed: int) -> list[DocumentView]:
    """Return some documents in the dataset's order, or of a dataset of preferences some pairs, with the beginning of each part's text."""
    is_paired = dataset.manifest is not None and dataset.manifest.conversations.get("kind") == "preferences"
    sides = ("chosen", "rejected") if is_paired else ("",)
    most = dataset.num_documents // len(sides)
    chosen = sorted(np.random.default_rng(seed).choice(most, min(num, most), replace=False).tolist())
    views = []
    for number in chosen:
        for side, name in enumerate(sides):
            document = len(sides) * number + side
            title = f"pair {number}, {name} (document {document})" if name else f"document {document}"
            views.append(DocumentView(title, _parts(dataset, tokenizer, document, num_characters)))
    return views


def _parts(dataset: TokenDataset, tokenizer: Tokenizer, document: int, num_characters: int) -> list[Part]:
    first, end = int(dataset.document_offsets[document]), int(dataset.document_offsets[document + 1])
    if not dataset.limits_noise:
        # A token has a few characters on average. Four tokens per character would be single bytes of the rarest scripts.
        text = tokenizer.decode(dataset.read(first, min(end, first + 4 * num_characters)).tolist())
        return [Part(_shortened(text, num_characters), None)]
    ids = dataset.read(first, end).tolist()
    kinds: list[Kind] = ["noised" if flag else "clean" for flag in dataset.read_may_be_noised(first, end)]
    num_filled = _num_filled(ids, tokenizer)
    kinds[len(ids) - num_filled :] = ["fill"] * num_filled
    runs = [(kind, [ids[place] for place in places]) for kind, places in groupby(range(len(ids)), kinds.__getitem__)]
    return [Part(_shortened(tokenizer.decode(run[: 4 * num_characters]), num_characters), kind) for kind, run in runs]


def _num_filled(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Return how many EOS and <pad> follow the first EOS after the last other token."""
    fill = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    num_last = sum(1 for _ in takewhile(fill.__contains__, reversed(ids)))
    is_ended = num_last > 0 and ids[-num_last] == tokenizer.eos_token_id
    return num_last - int(is_ended)


def _shortened(text: str, num_characters: int) -> str:
    return text if len(text) <= num_characters else text[:num_characters] + "..."


def legend(views: Sequence[DocumentView], has_colors: bool) -> str:
    """Return a line that explains the parts; an empty text if the dataset does not limit the noise."""
    kinds = {part.kind for view in views for part in view.parts}
    shown = [Part(meaning, kind) for kind, meaning in _MEANINGS.items() if kind in kinds]
    return ", ".join(DocumentView("", [part]).for_terminal(has_colors).partition("\n")[2].rstrip("\n") for part in shown)


def page_legend(views: Sequence[DocumentView]) -> str:
    """Return the line of :func:`legend` as HTML."""
    kinds = {part.kind for view in views for part in view.parts}
    return "".join(f'<p><span class="{kind}">{html.escape(meaning)}</span></p>' for kind, meaning in _MEANINGS.items() if kind in kinds)

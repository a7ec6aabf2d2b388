"""A histogram of the lengths of documents, with bins that double in width, as text and as SVG."""

from __future__ import annotations

import html
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCKS = " ▏▎▍▌▋▊▉█"
_WIDTH, _ROW, _LABEL, _NUMBER = 720, 22, 130, 150


@dataclass(frozen=True, slots=True)
class Histogram:
    """The numbers of documents by their lengths in tokens. Bin k holds the lengths in [2^k, 2^(k+1)); all other bins are empty."""

    first: int
    """The number k of the first bin."""
    counts: list[int]
    """The number of documents in each bin."""
    tokens: list[int]
    """The number of tokens of the documents in each bin."""

    @classmethod
    def of(cls, lengths: NDArray[np.integer]) -> Histogram:
        """Return the histogram of lengths [n], of which at least one must not be 0. Documents without tokens are in no bin."""
        lengths = lengths[lengths > 0].astype(np.int64)
        assert len(lengths), "a histogram of nothing"
        # frexp is exact: log2 would put 2^k - 1 into the next bin for large k.
        bins = np.frexp(lengths.astype(np.float64))[1].astype(np.int64) - 1
        first = int(bins.min())
        counts = np.bincount(bins - first)
        tokens = np.zeros(len(counts), dtype=np.int64)
        np.add.at(tokens, bins - first, lengths)
        return cls(first, counts.tolist(), tokens.tolist())

    def labels(self) -> list[str]:
        """Return a label for each bin, such as "1024-2047"."""
        return [f"{2**k}-{2 ** (k + 1) - 1}" if k else "1" for k in range(self.first, self.first + len(self.counts))]

    def text(self, width: int = 40) -> str:
        """Return the histogram as lines of bars, with the number of documents and their share of all tokens."""
        labels = self.labels()
        label_width, num_tokens = max(map(len, labels)), sum(self.tokens)
        lines = [f"{'tokens':>{label_width}}  {'documents':<{width}}  {'':>11} {'of tokens':>9}"]
        for label, count, tokens in zip(labels, self.counts, self.tokens, strict=True):
            lines.append(
                f"{label:>{label_width}}  {_bar(count / max(self.counts), width):<{width}}  {count:>11,} {tokens / num_tokens:>9.1%}"
            )
        return "\n".join(lines)

    def svg(self) -> str:
        """Return the histogram as an SVG picture, for light and dark pages."""
        height = _ROW * (len(self.counts) + 1) + 8
        largest, num_tokens = max(self.counts), sum(self.tokens)
        rows = []
        for number, (label, count, tokens) in enumerate(zip(self.labels(), self.counts, self.tokens, strict=True), 1):
            bar = (_WIDTH - _LABEL - _NUMBER) * count / largest
            y = number * _ROW
            rows.append(
                f'<text x="{_LABEL - 8}" y="{y + 15}" text-anchor="end">{html.escape(label)}</text>'
                f'<rect x="{_LABEL}" y="{y + 3}" width="{bar:.1f}" height="{_ROW - 6}" fill="#3b7dd8"/>'
                f'<text x="{_LABEL + bar + 6:.1f}" y="{y + 15}">{count:,} ({tokens / num_tokens:.1%} of tokens)</text>'
            )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
            f'font-family="sans-serif" font-size="12" fill="#808080" role="img" aria-label="documents by length">'
            f'<text x="{_LABEL - 8}" y="15" text-anchor="end">tokens</text><text x="{_LABEL}" y="15">documents</text>'
            f"{''.join(rows)}</svg>\n"
        )


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + _BLOCKS[eighths % 8].strip()

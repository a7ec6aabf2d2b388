"""The choice of the text that is held out for validation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable

from data_tools.unit_reader import Document
from w1train.data.indexed import DatasetError

logger = logging.getLogger(__name__)


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out: whether the SHA-256 of its text, as a number in [0, 1), is below ``fraction``."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < fraction * 2**64


class HashSplit:
    """A split that holds out whole documents by the hash of their text."""

    def __init__(self, fraction: float) -> None:
        self._fraction = fraction

    def __call__(self, document: Document) -> list[tuple[Document, bool]]:
        """Return the document, and whether it is held out."""
        return [(document, is_validation(document.text, self._fraction))]


class TailSplit:
    """A split that holds out the end of the corpus. The cut may be inside a document, at a line break.

    Call it once for each document, in the corpus's order.
    """

    def __init__(self, num_bytes: int, num_documents: int, fraction: float) -> None:
        """Accept the numbers of bytes and documents of the corpus, and the fraction to hold out."""
        self._num_bytes_left = round(num_bytes * (1 - fraction))
        self._num_documents_left = num_documents
        self._has_training_text = False

    def __call__(self, document: Document) -> list[tuple[Document, bool]]:
        """Return each piece, and whether it is held out: the whole document, or the two pieces of the document that is cut.

        Raises:
            DatasetError: if the corpus is a single document of one line.
        """
        self._num_documents_left -= 1
        if self._has_training_text and self._num_bytes_left <= 0:
            return [(document, True)]
        is_last = self._num_documents_left == 0
        if not is_last and document.num_bytes <= self._num_bytes_left:
            return self._keep(document)
        place = _line_break(document.text, len(document.text.encode()[: self._num_bytes_left].decode(errors="ignore")))
        if place is not None:
            self._keep(document)
            logger.info("validation begins at line %d of %s", document.text.count("\n", 0, place) + 1, document.origin)
            return [(_part(document, document.text[:place]), False), (_part(document, document.text[place:]), True)]
        if not is_last:
            return self._keep(document)
        if not self._has_training_text:
            raise DatasetError(f"{document.origin} is a single line and the only document: no part of it can be held out for validation")
        return [(document, True)]

    def _keep(self, document: Document) -> list[tuple[Document, bool]]:
        self._num_bytes_left -= document.num_bytes
        self._has_training_text = True
        return [(document, False)]


def choose_split(corpus: Iterable[Document], fraction: float) -> HashSplit | TailSplit:
    """Choose the split by hash, unless one side would then have no document. The corpus is read only until both sides have a document.

    Raises:
        CorpusError: if the corpus is empty or not text.
    """
    if fraction == 0:
        return HashSplit(0)
    sides = set()
    num_bytes = num_documents = 0
    for document in corpus:
        sides.add(is_validation(document.text, fraction))
        if len(sides) == 2:
            return HashSplit(fraction)
        num_bytes += document.num_bytes
        num_documents += 1
    logger.info(
        "the hashes of the corpus's %d documents all fall on one side: the last %.3g of its text is held out for validation instead",
        num_documents,
        fraction,
    )
    return TailSplit(num_bytes, num_documents, fraction)


def _line_break(text: str, wanted: int) -> int | None:
    """Return the beginning of the line that is nearest to a place and has text other than white space on both sides; None without such a
    line."""
    first = len(text) - len(text.lstrip())
    last = len(text.rstrip())
    wanted = min(max(wanted, first), last)
    candidates = [place for place in (text.rfind("\n", first, wanted), text.find("\n", wanted, last)) if place >= 0]
    return min(candidates, key=lambda place: abs(place + 1 - wanted)) + 1 if candidates else None


def _part(document: Document, text: str) -> Document:
    return Document(text, document.origin, len(text.encode("utf-8")))

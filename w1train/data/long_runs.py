"""The cut of long runs of characters in the texts that a tokenizer is trained on.

The trainer of the library keeps each piece of text as a list of tokens, and each merge removes tokens from the middle of the list. Its
time for a piece grows with the square of the piece's length: a piece of 200,000 blanks takes half a minute. Words, numbers and
indentations are far shorter than LONGEST_RUN. DNA, encoded images, rulers and padding may be longer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)

LONGEST_RUN = 1024
"""The most characters of a run that stays whole. A run holds letters and digits, or white space, or other characters."""

# \\s of Python is not that of the library's regular expressions, which decides where pieces end.
_WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_KINDS = (r"[^\W_]", f"[{_WHITE_SPACE}]", rf"(?:[^\w{_WHITE_SPACE}]|_)")
# Possessive, because the expression need not try shorter runs.
_RUN = re.compile("|".join(f"{kind}++" for kind in _KINDS))


class LongRuns:
    """The long runs that were cut, counted for the log."""

    def __init__(self) -> None:
        self.num_runs = self.num_characters = self.longest = 0

    def cut(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield the texts, those with long runs in parts, and warn at the end if there were any.

        A text without long runs is yielded unchanged. The parts of a text, joined, are the text.
        """
        for text in texts:
            yield from self._parts(text)
        if self.num_runs:
            logger.warning(
                "cut %d runs of more than %d characters without a boundary (%d characters in all, the longest run has %d): the tokenizer "
                "is trained on parts of them, since the time for a run grows with the square of its length; encoding does not cut them",
                *(self.num_runs, LONGEST_RUN, self.num_characters, self.longest),
            )

    def _parts(self, text: str) -> Iterator[str]:
        begin = 0
        for start, end in long_runs(text):
            self._count(end - start)
            for cut in range(start + LONGEST_RUN, end, LONGEST_RUN):
                yield text[begin:cut]
                begin = cut
        yield text[begin:]

    def _count(self, length: int) -> None:
        self.num_runs += 1
        self.num_characters += length
        self.longest = max(self.longest, length)


def long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each run of more than LONGEST_RUN characters.

    The search looks only at every 512th character, because a look at each would double the time of the training. A long run contains two
    of these places, so it has more than 512 characters from the first of them on.
    """
    step = LONGEST_RUN // 2
    end = 0
    for place in range(0, len(text), step):
        if place < end or _run_end(text, place) - place <= step:
            continue
        start = max(place - step, 0)
        end = _run_end(text, start)
        while end <= place:
            start, end = end, _run_end(text, end)
        if end - start > LONGEST_RUN:
            yield start, end


def _run_end(text: str, place: int) -> int:
    match = _RUN.match(text, place)
    assert match is not None, "each character is of a kind"
    return match.end()

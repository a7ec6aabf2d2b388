"""Best-fit packing, which puts documents into samples of one length and cuts no document that fits into a sample.

The algorithm is best-fit decreasing, as in Ding et al., "Fewer truncations improve language modeling" (arXiv 2404.10830): the longest
document comes first, and each goes into the sample in which it leaves the least room.

Shapes: n = documents, p = pieces (a document, or a part of one that is longer than a sample).
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class PackedPieces(NamedTuple):
    """The pieces, sorted by their samples; the pieces of a sample have a random order."""

    sample_of_piece: NDArray[np.int64]
    """[p]: sample of each piece, nondecreasing from 0."""
    documents: NDArray[np.int64]
    """[p]: document of each piece."""
    ordinals: NDArray[np.int64]
    """[p]: the part of its document that each piece is, counted from 0; part k begins at the document's token k * sequence_length."""
    lengths: NDArray[np.int64]
    """[p]: number of tokens of each piece."""
    num_samples: int

    def waste(self, sequence_length: int) -> float:
        """Return the share of all samples' positions that is padding."""
        return 1 - int(self.lengths.sum()) / (self.num_samples * sequence_length)


def pack_best_fit(lengths: NDArray[np.integer], sequence_length: int, align: int = 1, seed: int = 0) -> PackedPieces:
    """Pack documents with the given lengths, int [n]; documents without tokens are left out.

    A document that is longer than ``sequence_length`` is split into parts of exactly this length and a rest, which is packed like a
    document. Pieces of equal length are interchangeable, and ``seed`` decides which of them goes into which sample. Packing takes about as
    long as sorting the pieces.

    Args:
        align: pieces begin at multiples of this number inside their sample; it must divide ``sequence_length``.

    Raises:
        ValueError: if ``align`` does not divide ``sequence_length``, or no document has a token.
    """
    if sequence_length < 1 or align < 1 or sequence_length % align:
        raise ValueError(f"align ({align}) must divide the sequence length ({sequence_length})")
    documents, ordinals, piece_lengths = _split(np.asarray(lengths, dtype=np.int64), sequence_length)
    if len(documents) == 0:
        raise ValueError("there are no tokens to pack")
    keys = _random_keys(len(documents), seed)
    sizes = -(-piece_lengths // align)  # in units of align
    by_size = np.lexsort((keys, -sizes))
    sample_of_piece, num_samples = _assign(sizes[by_size], sequence_length // align)
    # The pieces were dealt by length. Without another order every sample would begin with its longest document.
    order = np.lexsort((keys[by_size], sample_of_piece))
    chosen = by_size[order]
    return PackedPieces(sample_of_piece[order], documents[chosen], ordinals[chosen], piece_lengths[chosen], num_samples)


def _split(lengths: NDArray[np.int64], sequence_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the document, the ordinal and the length of every piece, [p] each."""
    counts = -(-lengths // sequence_length)
    documents = np.repeat(np.arange(len(lengths)), counts)
    ordinals = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    return documents, ordinals, np.minimum(lengths[documents] - ordinals * sequence_length, sequence_length)


def _random_keys(num: int, seed: int) -> NDArray[np.uint64]:
    return np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(num)


def _assign(sizes: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Return the sample of each piece, int64 [p], and the number of samples. ``sizes`` must descend.

    All pieces of one size are dealt at once: the fullest samples with room for such a piece take as many as they can, then the next
    fullest samples, and at last new samples. Dealing the pieces one by one gives the same samples, because a sample that has taken a piece
    is the fullest of those that have room for another.
    """
    sample_of_piece = np.empty(len(sizes), dtype=np.int64)
    num_samples = 0
    by_room: dict[int, list[NDArray[np.int64]]] = defaultdict(list)
    has_room = np.zeros(capacity + 1, dtype=bool)
    starts = np.flatnonzero(np.diff(sizes, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(sizes)], strict=True):
        size = int(sizes[start])
        while start < stop:
            room = size + int(np.argmax(has_room[size:])) if has_room[size:].any() else capacity
            each = room // size
            num_needed = -(-(stop - start) // each)
            if has_room[room]:
                group = by_room[room].pop()
                has_room[room] = bool(by_room[room])
                if len(group) > num_needed:
                    by_room[room].append(group[num_needed:])
                    has_room[room] = True
                    group = group[:num_needed]
            else:
                group = np.arange(num_samples, num_samples + num_needed)
                num_samples += num_needed
            num_placed = min(len(group) * each, stop - start)
            sample_of_piece[start : start + num_placed] = np.repeat(group, each)[:num_placed]
            start += num_placed
            num_last = num_placed - (len(group) - 1) * each
            for part, left in ((group[:-1], room - each * size), (group[-1:], room - num_last * size)):
                if left and len(part):
                    by_room[left].append(part)
                    has_room[left] = True
    return sample_of_piece, num_samples

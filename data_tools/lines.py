"""The lines of a file in blocks of about one size. A line over the limit is skipped without being held in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from w1train.data.text.decompress import ContentReader, DamagedError, WindowError

_QUIET_BYTES = 1 << 26
"""The most bytes that are decoded before a block is yielded, so that progress is shown while a long line is skipped."""
_EMPTY_CHUNK_BYTES = 1 << 12
"""The bytes that an empty chunk counts as: it takes as much time to decode."""


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines, or a skipped line over the limit, which an earlier block announces, or the progress of reading alone."""

    content: bytes = b""
    """The lines. The last line of the file may lack its line break."""
    num_bytes_passed: int = 0
    """The number of bytes decoded and dropped since the last block."""
    announces_long_line: bool = False
    """This flag tells whether the next line is over the limit, and its end has not been found yet."""
    long_line: int | None = None
    """The length of the line over the limit, without its line break, if the block stands for this line."""
    length: int = 0
    """The number of bytes of the file that the block stands for, decompressed."""
    fault: str = ""
    """The reason why the rest of the file cannot be read."""
    needs_memory: bool = False
    """Tell whether the reason is a limit on memory."""


class LineBlocks:
    """The blocks of a file, from the beginning of a line on.

    A block ends with the last line that ends within ``block_bytes``, or with its first line if no line does. So the end of a block depends
    only on its beginning.
    """

    def __init__(self, stream: ContentReader, offset: int, block_bytes: int, max_line_bytes: int) -> None:
        self._chunks = stream.chunks(offset)
        self._block_bytes = block_bytes
        self._most = max(block_bytes, max_line_bytes)
        """The number of bytes within which a line must end. A shorter line that is over the limit stays in its block, and the reader leaves
        it out."""
        self._pending = bytearray()
        self._searched = 0
        self._num_quiet = 0
        self._num_passed = 0

    def __iter__(self) -> Iterator[Block]:
        fault, needs_memory = "", False
        try:
            for chunk in chain(self._chunks, [b""]):
                self._pending += chunk
                yield from self._blocks()
                if self._is_quiet(chunk):
                    yield self._progress()
        except (DamagedError, WindowError) as error:
            fault, needs_memory = str(error), isinstance(error, WindowError)
            del self._pending[self._pending.rfind(b"\n") + 1 :]  # the last line is cut
        if self._pending:
            yield Block(bytes(self._pending), length=len(self._pending))
        if fault:
            yield Block(fault=fault, needs_memory=needs_memory)

    def _blocks(self) -> Iterator[Block]:
        while True:
            if stop := self._end():
                yield Block(bytes(self._pending[:stop]), length=stop)
                del self._pending[:stop]
            elif len(self._pending) > self._most:
                yield from self._pass_over()
            else:
                return
            self._searched = self._num_quiet = 0

    def _end(self) -> int:
        """Return where the first block of the pending bytes ends, or 0 if it does not end in them."""
        size = self._block_bytes
        if len(self._pending) < size:
            return 0
        stop = self._pending.rfind(b"\n", 0, size) + 1 if self._searched < size else 0
        stop = stop or self._pending.find(b"\n", max(self._searched, size), self._most + 1) + 1
        self._searched = len(self._pending)
        return stop

    def _pass_over(self) -> Iterator[Block]:
        """Drop the rest of a line, and yield the block of the line."""
        yield Block(announces_long_line=True)
        num_bytes = num_ends = 0
        for chunk in chain([bytes(self._pending)], self._chunks):
            self._pending.clear()
            stop = chunk.find(b"\n")
            dropped = stop if stop >= 0 else len(chunk)
            num_bytes += dropped
            self._num_passed += dropped
            if stop >= 0:
                self._pending += chunk[stop + 1 :]
                num_ends = 1
                break
            if self._is_quiet(chunk):
                yield self._progress()
        yield Block(num_bytes_passed=self._num_passed, long_line=num_bytes, length=num_bytes + num_ends)
        self._num_passed = 0

    def _is_quiet(self, chunk: bytes) -> bool:
        self._num_quiet += max(len(chunk), _EMPTY_CHUNK_BYTES)
        return self._num_quiet >= _QUIET_BYTES

    def _progress(self) -> Block:
        block = Block(num_bytes_passed=self._num_passed)
        self._num_quiet = self._num_passed = 0
        return block

"""A reader that decompresses a file in small pieces, so that memory does not depend on the decompressed length."""

from __future__ import annotations

import importlib
import os
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import Protocol

from data_tools.corpus_files import CorpusError, compression_of

CHUNK_BYTES = 1 << 16
_INPUT_BYTES = 1 << 14
"""The compressed bytes that are read at once. The rest of such a piece is copied at each end of a frame, so larger pieces would be slow for
many small frames."""
_ZSTANDARD_WINDOW_LOG = 27
"""The largest window of a frame, 128 MiB, which the decompressor holds in memory. The zstd command has the same limit without --long."""


class _Frame(Protocol):
    """A decoder of one gzip member or one Zstandard frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class ContentReader:
    """A reader of a file's content, which it decompresses if the name ends as those of compressed files do. Use it as a context manager.

    A file may have any number of gzip members or Zstandard frames, one after the other.
    """

    def __init__(self, path: str) -> None:
        """Open the file.

        Raises:
        CorpusError: if the file needs Zstandard, and its library is not installed.
        OSError: if the file cannot be opened.
        """
        self._compression = compression_of(path)
        self._zstandard = _zstandard(path) if self._compression == "zstd" else None
        self._file = open(path, "rb")  # noqa: SIM115 (closed with this object)
        self.num_bytes: int | None = None if self._compression else os.fstat(self._file.fileno()).st_size
        """Length of the content; None for a compressed file, because the length that such a file states is not reliable."""

    @property
    def num_bytes_read(self) -> int:
        """Return how many bytes of the file, compressed as it is, have been read."""
        return self._file.tell()

    def chunks(self, offset: int = 0) -> Iterator[bytes]:
        """Yield the content from an offset on, in chunks of at most CHUNK_BYTES.

        A chunk is empty if a piece of the file decodes to nothing or lies before the offset. The caller can therefore show progress even
        while a file decodes to nothing for a long time.

        Raises:
            One of the exceptions of :func:`damage`, where the compressed file is damaged.
        """
        if self._compression is None:
            self._file.seek(offset)
            while chunk := self._file.read(CHUNK_BYTES):
                yield chunk
            return
        for chunk in self._decompressed():
            yield chunk[offset:]
            offset = max(0, offset - len(chunk))

    def _decompressed(self) -> Iterator[bytes]:
        # Like the gzip command, treat zero bytes after a member as padding.
        padding = b"\0" if self._compression == "gzip" else b""
        data = self._file.read(_INPUT_BYTES)
        while data:
            frame = self._new_frame()
            yield frame.decompress(data, CHUNK_BYTES)
            while not frame.eof:
                data = self._file.read(_INPUT_BYTES) if frame.needs_input else b""
                if frame.needs_input and not data:
                    raise EOFError("it ends before its end-of-stream marker")
                yield frame.decompress(data, CHUNK_BYTES)
            data = frame.unused_data.lstrip(padding)
            while not data and (more := self._file.read(_INPUT_BYTES)):
                data = more.lstrip(padding)
                yield b""

    def _new_frame(self) -> _Frame:
        if self._zstandard is None:
            return _GzipMember()
        options = {self._zstandard.DecompressionParameter.window_log_max: _ZSTANDARD_WINDOW_LOG}
        frame: _Frame = self._zstandard.ZstdDecompressor(options=options)
        return frame

    def __enter__(self) -> ContentReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()


class _GzipMember:
    """A decoder of one gzip member, with the interface of Zstandard's decompressor."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=zlib.MAX_WBITS + 16)  # adding 16 selects gzip's header and checksum
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        content = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        # After a full piece, zlib may hold more output although it has taken all of the input.
        self.needs_input = len(content) < max_length and not self._inner.unconsumed_tail
        return content


def damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that the decoders raise for a damaged file."""
    kinds: tuple[type[Exception], ...] = (EOFError, zlib.error)
    return (*kinds, _zstandard("").ZstdError) if _has_zstandard() else kinds


def _has_zstandard() -> bool:
    return any(name in sys.modules for name in ("compression.zstd", "backports.zstd"))


def _zstandard(path: str) -> ModuleType:
    """Return the Zstandard module: Python's own from 3.14 on, otherwise its backport."""
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise CorpusError(f"{path} is compressed by Zstandard, which needs {name}: pip install 'w1train[data]'") from None

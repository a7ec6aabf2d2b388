"""A reader that decompresses a file in small pieces, so that memory does not depend on the decompressed length."""

from __future__ import annotations

import importlib
import os
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType, TracebackType
from typing import Protocol

from w1train.data.text.file_names import CorpusError, compression_of
from w1train.runtime.files import errors_named

CHUNK_BYTES = 1 << 16
_INPUT_BYTES = 1 << 14
"""The compressed bytes that are read at once. The rest of such a piece is copied at each end of a frame, so larger pieces would be slow for
many small frames."""
DEFAULT_WINDOW = 2 << 30
"""The default limit on the window of Zstandard and on the memory of xz. It admits all that ``zstd --long=31`` and ``xz -9`` write."""
_XZ_OVERHEAD = 1 << 20
"""The bytes that xz needs in addition to its window."""
_SMALLEST_WINDOW_LOG, _LARGEST_WINDOW_LOG = 27, 31
"""Windows of 128 MiB are always admitted, as by the zstd command without --long. The library does not know windows over 2 GiB."""


class DamagedError(Exception):
    """The error of a file that is damaged or ends too early. The message says how."""


class WindowError(Exception):
    """The error of a compressed file that needs more memory than the limit. The file itself may be good."""


class _Frame(Protocol):
    """A decoder of one gzip member, Zstandard frame, xz stream or bzip2 stream."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class ContentReader:
    """A reader of a file's content, which it decompresses if the name ends as those of compressed files do. Use it as a context manager.

    A file may have any number of gzip members, Zstandard frames, xz or bzip2 streams, one after the other.
    """

    def __init__(self, path: str, max_window: int = DEFAULT_WINDOW) -> None:
        """Open the file.

        Args:
            max_window: the most bytes of decoded content that a decoder may keep for later references. Windows of 128 MiB are always
                allowed.

        Raises:
        CorpusError: if the library that the compression needs is not installed.
        OSError: if the file cannot be opened.
        """
        self._path = path
        self._compression = compression_of(path)
        self._library = _library(path, self._compression)
        self._window_log = min(max(max_window.bit_length() - 1, _SMALLEST_WINDOW_LOG), _LARGEST_WINDOW_LOG)
        # bz2 raises OSError for damaged content. Only calls of a decoder are guarded, so a fault of the disk stays an OSError.
        self._faults: tuple[type[Exception], ...] = (OSError, EOFError, MemoryError, zlib.error)
        self._faults += tuple(getattr(self._library, name) for name in ("LZMAError", "ZstdError") if hasattr(self._library, name))
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
            DamagedError: where the compressed file is damaged.
            WindowError: where decoding needs more memory than the limit.
            OSError: if the file cannot be read; the error has its path.
        """
        if self._compression is None:
            with errors_named(self._path):
                self._file.seek(offset)
            while chunk := self._read(CHUNK_BYTES):
                yield chunk
            return
        for chunk in self._decompressed():
            yield chunk[offset:]
            offset = max(0, offset - len(chunk))

    def _read(self, num_bytes: int) -> bytes:
        with errors_named(self._path):
            return self._file.read(num_bytes)

    def _decompressed(self) -> Iterator[bytes]:
        # Like the gzip and xz commands, treat zero bytes after a member as padding.
        padding = b"\0" if self._compression in ("gzip", "xz") else b""
        data = self._read(_INPUT_BYTES)
        if not data:
            raise DamagedError("the compressed file is damaged: it has 0 bytes, and even empty content has some when it is compressed")
        while data:
            frame = self._new_frame()
            yield self._decoded(frame, data)
            while not frame.eof:
                data = self._read(_INPUT_BYTES) if frame.needs_input else b""
                if frame.needs_input and not data:
                    raise DamagedError("the compressed file is damaged here: it ends before its end-of-stream marker")
                yield self._decoded(frame, data)
            data = frame.unused_data.lstrip(padding)
            while not data and (more := self._read(_INPUT_BYTES)):
                data = more.lstrip(padding)
                yield b""

    def _decoded(self, frame: _Frame, data: bytes) -> bytes:
        try:
            return frame.decompress(data, CHUNK_BYTES)
        except self._faults as error:
            # The libraries tell a file that needs too much memory from a damaged file by the text alone.
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                limit = f"{1 << (self._window_log - 20)} MiB"
                raise WindowError(
                    f"decompression needs more memory than the limit of {limit}, or than the machine has (a window of zstd --long, for "
                    f"example; --max-row-group-size raises the limit to 2 GiB at most)"
                ) from error
            if "dictionary" in str(error).lower():
                raise WindowError("decompression needs the dictionary with which the file was compressed: decompress it first") from error
            raise DamagedError(f"the compressed file is damaged here: {error}") from error

    def _new_frame(self) -> _Frame:
        frame: _Frame
        match self._compression:
            case "xz":
                frame = self._library.LZMADecompressor(self._library.FORMAT_XZ, memlimit=(1 << self._window_log) + _XZ_OVERHEAD)
            case "zstd":
                options = {self._library.DecompressionParameter.window_log_max: self._window_log}
                frame = self._library.ZstdDecompressor(options=options)
            case "bzip2":
                frame = self._library.BZ2Decompressor()
            case _:
                frame = _GzipMember()
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


def _library(path: str, compression: str | None) -> ModuleType:
    """Return the module that decodes a compression. Zstandard's is Python's own from 3.14 on, otherwise its backport."""
    zstandard = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    name = {"zstd": zstandard, "xz": "lzma", "bzip2": "bz2"}.get(compression or "", "zlib")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        help_ = "pip install 'w1train[data]'" if compression == "zstd" else "this Python was built without it"
        raise CorpusError(f"{path} is compressed by {compression}, which needs {name}: {help_}") from None

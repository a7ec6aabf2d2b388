"""Object storage through fsspec (s3://, gs://, file://, ...).

fsspec raises the exceptions of the library of a protocol. Those of botocore, gcsfs and aiohttp are often not OSErrors, and cannot always be
sent to another rank. Here each failure becomes one StorageError, whose message names the storage and what to check. After a failure that
may pass, another attempt is made.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from asyncio import CancelledError
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

from w1train.config.errors import UserError
from w1train.runtime.masking import mask
from w1train.runtime.pulse import moved

logger = logging.getLogger(__name__)

ATTEMPTS = 5
retry_seconds = 1.0
"""Seconds before the second attempt; the time doubles before each further attempt. Tests set it to 0."""
CHUNK_BYTES = 16 << 20

_REFUSALS = (401, 403)
_CREDENTIAL_ERRORS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError", "ClientAuthenticationError"}
)
"""Class names of botocore, google-auth and azure-core, which need not be installed."""


class StorageError(OSError):
    """A failure of object storage. The message has its URL, what the library said and what to check."""


class WrongSizeError(StorageError):
    """A file of object storage that is shorter or longer than it should be."""


class _LocalError(Exception):
    """A failure of the local disk in the middle of a transfer, which is not the storage's."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def require_protocol(key: str, url: str) -> None:
    """Check that fsspec knows the protocol of a URL and finds its package. This opens no connection.

    Raises:
        UserError: fsspec does not know the protocol, or the package is missing. The message names ``key``, the configuration key of the
            URL.
    """
    import fsspec

    try:
        for part in url.split("::"):
            fsspec.get_filesystem_class(fsspec.utils.get_protocol(part))
    except (ImportError, ValueError) as error:
        raise UserError(mask(f"{key}: {url}: {error}")) from error


class ObjectStorage:
    """The files under a URL. Paths are those of fsspec, and begin with ``root``.

    Every method makes ATTEMPTS attempts. It raises FileNotFoundError at once if the file is not there, and StorageError if the storage
    refuses or the last attempt fails too. The first method that is called opens the connection; making the object opens nothing.
    """

    def __init__(self, url: str) -> None:
        # Slashes at the end are removed, but not those of "://".
        self._url = re.sub(r"(?<![:/])/+$", "", url)

    @property
    def url(self) -> str:
        """The URL as messages show it: without a password."""
        return mask(self._url)

    @property
    def root(self) -> str:
        """The path that the URL stands for."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        import fsspec

        return self._try("open it", partial(fsspec.core.url_to_fs, self._url))

    def names(self, directory: str) -> list[str]:
        """Return the names directly under a directory; an empty list if it is not there. A listing may be stale."""
        try:
            paths = self._do("list", directory, lambda files: files.ls(directory, detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def glob(self, pattern: str) -> list[str]:
        """Return the paths that match a pattern. They come from a listing, which may be stale or wrong: the caller checks them."""
        return self._do("list", pattern, lambda files: files.glob(pattern))

    def info(self, path: str) -> dict[str, Any]:
        """Return what the storage says of a file: ``size`` (bytes, an integer) and whatever else it has."""
        info = self._do("look for", path, lambda files: files.info(path))
        size = info.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise WrongSizeError(mask(f"{self._url}: the storage does not say how long {path} is, but {size!r}"))
        return info

    def exists(self, path: str) -> bool:
        """Tell whether a file or directory is there. fsspec's own ``exists`` says no when the storage cannot be reached."""
        try:
            self._do("look for", path, lambda files: files.info(path))
        except FileNotFoundError:
            return False
        return True

    def read(self, path: str, limit: int) -> bytes:
        """Return the content of a small file, or its first ``limit`` + 1 bytes if it is longer than ``limit``."""

        def read(files: Any) -> bytes:
            with files.open(path, "rb") as source:
                return source.read(limit + 1)

        return self._do("read", path, read)

    def write(self, path: str, content: bytes) -> None:
        """Make or replace a small file."""
        self._do("write", path, lambda files: files.pipe_file(path, content))

    def make_directory(self, path: str) -> None:
        """Make a directory, where the storage has directories."""
        self._do("write", path, lambda files: files.makedirs(path, exist_ok=True))

    def upload(self, file: Path, path: str, on_progress: Callable[[], None]) -> None:
        """Copy a local file to the storage. ``on_progress`` is called after each part whose arrival the library reports, and at the end."""
        from fsspec.callbacks import Callback

        class Progress(Callback):
            def relative_update(self, inc: int = 1) -> None:
                on_progress()

        self._do("send", path, lambda files: files.put_file(str(file), path, callback=Progress()))
        on_progress()

    def download(self, path: str, file: BinaryIO, num_bytes: int) -> None:
        """Copy a file of ``num_bytes`` bytes into an open local file, and never write more bytes.

        Raises:
            WrongSizeError: another number of bytes arrived, or the storage says that the file has another size.
            OSError: the local file could not be written.
        """
        if (size := self.info(path)["size"]) != num_bytes:
            raise WrongSizeError(f"{self.url}: {mask(path)} has {size} bytes, expected {num_bytes}")
        self._do("fetch", path, lambda files: _copy(files, path, file, num_bytes))

    def rename(self, path: str, new_path: str) -> None:
        """Give a file another name."""
        self._do("rename", path, lambda files: files.mv(path, new_path))

    def remove_file(self, path: str) -> None:
        """Remove a file; does nothing if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self._do("remove", path, lambda files: files.rm_file(path))

    def remove_directory(self, path: str) -> None:
        """Remove a directory with all that is in it; does nothing if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            self._do("remove", path, lambda files: files.rm(path, recursive=True))

    def _do[Result](self, what: str, path: str, action: Callable[[Any], Result]) -> Result:
        files = self._opened[0]

        def act() -> Result:
            # fsspec keeps listings, in which changes by other processes are missing.
            files.invalidate_cache()
            return action(files)

        return self._try(f"{what} {path}", act)

    def _try[Result](self, what: str, action: Callable[[], Result]) -> Result:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except FileNotFoundError:
                raise FileNotFoundError(mask(f"{self._url}: could not {what}: it is not there, or its bucket is not")) from None
            except _LocalError as error:
                raise error.error from None
            except (Exception, CancelledError) as error:
                # Only the storage's library is called here, and its exceptions have no common base class.
                if attempt == ATTEMPTS or not _may_pass(error):
                    raise self._explained(what, attempt, error) from error
                logger.warning("%s: could not %s: %s; trying again", self.url, mask(what), _text(error))
                time.sleep(retry_seconds * 2 ** (attempt - 1))
        raise AssertionError("the last attempt neither returned nor raised")

    def _explained(self, what: str, attempts: int, error: BaseException) -> StorageError:
        times = f", {attempts} times in a row" if attempts > 1 else ""
        if isinstance(error, WrongSizeError):
            return WrongSizeError(f"{self.url}: could not {mask(what)}{times}: {error}")
        check = "the URL, the credentials and the network" if _may_pass(error) else "the credentials, and what they allow there"
        return StorageError(f"{self.url}: could not {mask(what)}{times}: {_text(error)}. Check {check}")


def _copy(files: Any, path: str, file: BinaryIO, num_bytes: int) -> None:
    file.seek(0)
    file.truncate()
    with files.open(path, "rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            if file.tell() + len(chunk) > num_bytes:
                raise WrongSizeError(f"more than the expected {num_bytes} bytes came")
            try:
                file.write(chunk)
                moved()
            except OSError as error:
                raise _LocalError(OSError(error.errno, error.strerror, file.name)) from error
    if file.tell() != num_bytes:
        raise WrongSizeError(f"{file.tell()} bytes came, expected {num_bytes}")


def _may_pass(error: BaseException) -> bool:
    """Tell whether another attempt may succeed. After a refusal, or without a package, it cannot."""
    is_refused = isinstance(error, PermissionError) or _http_status(error) in _REFUSALS or type(error).__name__ in _CREDENTIAL_ERRORS
    return not is_refused and not isinstance(error, ImportError)


def _http_status(error: BaseException) -> object:
    """Return the status of an HTTP answer, from where botocore, gcsfs, aiohttp and azure keep it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    names = ("code", "status", "status_code")
    return next((getattr(holder, name) for holder in (error, response) for name in names if hasattr(holder, name)), None)


def _text(error: BaseException) -> str:
    """Return the type and message of an exception, in one line and without passwords."""
    message = " ".join(str(error).split())
    return mask(f"{type(error).__name__}: {message}" if message else type(error).__name__)

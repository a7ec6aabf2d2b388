"""Object storage that fails, lies and is slow: an fsspec file system over a local directory, which forked ranks share.

    url = create(tmp_path / "bucket")                          # faulty:///tmp/.../bucket
    set_faults(tmp_path / "bucket", failing={"put": 0.3}, seed=7)
    ...                                                        # a run with checkpoint.upload=url
    assert counts(tmp_path / "bucket")["put failed"] > 0

The faults stand in ``bucket.faults.json`` beside the directory and are read at each operation, so a test may change them while ranks run.
The operations are counted by kind in ``bucket.counts.json``. The kinds are: ``put`` (put_file, pipe_file, mv), ``get`` (get_file, open for
reading), ``info`` (info and all that asks for it: exists, the check before a copy), ``list`` (ls, glob, find) and ``remove``.
Importing this module registers the protocol; a new interpreter must import it too.
"""

from __future__ import annotations

import fcntl
import fnmatch
import io
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

PROTOCOL = "faulty"
MAX_SECONDS = 20.0
"""The longest that one operation is held or slowed down."""


class ClientError(Exception):
    """A refusal as botocore raises it: no OSError, and made from something else than its text."""

    def __init__(self, response: dict[str, Any], operation: str) -> None:
        super().__init__(f"An error occurred ({response['Error']['Code']}) when calling the {operation} operation")
        self.response = response


class HttpError(Exception):
    """An answer as gcsfs raises it, with the status in ``code``."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"{answer['message']}, {answer['code']}")
        self.code = answer["code"]


class ClientConnectionError(Exception):
    """A lost connection as aiohttp raises it."""


def _client_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "Storage")


ERRORS: dict[str, Callable[[], Exception]] = {
    "OSError": lambda: OSError(5, "Input/output error"),
    "TimeoutError": lambda: TimeoutError("The read timed out"),
    "PermissionError": lambda: PermissionError(13, "Access Denied"),
    "FSTimeoutError": lambda: FSTimeoutError(),
    "ClientError": lambda: _client_error("SlowDown", 503),
    "ClientError denied": lambda: _client_error("AccessDenied", 403),
    "HttpError": lambda: HttpError({"message": "Backend Error", "code": 503}),
    "HttpError denied": lambda: HttpError({"message": "Forbidden", "code": 403}),
    "ClientConnectionError": lambda: ClientConnectionError("Connection closed"),
    "RuntimeError": lambda: RuntimeError("Loop is not running"),
    "KeyError": lambda: KeyError("ContentLength"),
}
"""What a storage library raises, by the name that ``Faults.error`` has for it."""


@dataclass
class Faults:
    """What goes wrong. Patterns are those of fnmatch, and are compared with the path below the directory (``*`` matches ``/`` too)."""

    failing: dict[str, float] = field(default_factory=dict)
    """Share of the operations that fail, by kind: {"put": 0.3}. Which ones fail follows from ``seed`` and their number alone."""
    num_failures: int | None = None
    """After so many failures of a kind nothing of that kind fails any more; None = no limit."""
    error: str = "OSError"
    """What a failing operation raises: a key of ERRORS."""
    only: str = "*"
    """The failures concern paths of this pattern alone."""
    seed: int = 0
    slow_seconds: float = 0.0
    """How much longer each put and get takes, MAX_SECONDS at most."""
    held: list[str] = field(default_factory=list)
    """Operations of these kinds wait until the faults have changed, MAX_SECONDS at most."""
    contents: dict[str, str] = field(default_factory=dict)
    """What reading a file gives in place of its content, by pattern: {"*/manifest.json": "[]"}."""
    gone: list[str] = field(default_factory=list)
    """Patterns of what listings show and nothing can read."""
    omitted: list[str] = field(default_factory=list)
    """Patterns of what listings leave out, and info, get and put find."""
    invented: list[str] = field(default_factory=list)
    """Names that listings of the directory itself show in addition, as directories."""


def create(directory: Path) -> str:
    """Make the (empty) storage of a directory without faults; its URL."""
    directory.mkdir(parents=True, exist_ok=True)
    set_faults(directory)
    return f"{PROTOCOL}://{directory}"


def set_faults(directory: Path, **faults: Any) -> None:
    """Have these faults (the fields of Faults) and no others from now on; the counts begin again."""
    for what, content in (("counts", {}), ("faults", asdict(Faults(**faults)))):
        # Replaced whole, for ranks that read meanwhile; not through w1train's function, which waits for the disk.
        new = directory.parent / f".{directory.name}.{what}.json"
        new.write_text(json.dumps(content))
        os.replace(new, _beside(directory, what))


def counts(directory: Path) -> dict[str, int]:
    """How many operations of each kind were begun and failed since the faults were set: {"put": 10, "put failed": 3}."""
    return json.loads(_beside(directory, "counts").read_text())


class FaultyFileSystem(LocalFileSystem):
    """The file system of ``faulty://``. A path outside of all storages that ``create`` has made has no faults."""

    protocol = PROTOCOL
    cachable = False

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        storage, name = self._begin("list", path)
        # Not this class's own: it asks for the info of each entry, whose faults are no matter of the listing.
        entries = LocalFileSystem().ls(path, detail=True, **kwargs)
        if storage is not None:
            faults = _read_faults(storage)
            entries = [entry for entry in entries if not _matches(_below(storage, entry["name"]), faults.omitted)]
            if name == "":
                entries += [{"name": f"{storage}/{new}", "size": 0, "type": "directory"} for new in faults.invented]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._begin("info", path)
        return super().info(path, **kwargs)

    def put_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        self._begin("put", path2)
        super().put_file(path1, path2, callback=callback, **kwargs)

    def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
        self._begin("put", path)
        Path(self._strip_protocol(path)).write_bytes(value)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        self._begin("put", path2)
        super().mv(path1, path2, **kwargs)

    def get_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        Path(path2).write_bytes(self.cat_file(path1))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        with self.open(path, "rb") as file:
            return file.read()[start:end]

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        storage, name = self._begin("get" if "r" in mode else "put", path)
        if storage is not None and "r" in mode:
            replaced = [text for pattern, text in _read_faults(storage).contents.items() if fnmatch.fnmatchcase(name, pattern)]
            if replaced:
                return io.BytesIO(replaced[0].encode())
        return super().open(path, mode, **kwargs)

    def rm_file(self, path: str) -> None:
        self._begin("remove", path)
        super().rm_file(path)

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._begin("remove", path)
        super().rm(path, recursive=recursive, maxdepth=maxdepth)

    def _begin(self, kind: str, path: str) -> tuple[Path | None, str]:
        """Count an operation and meet what the faults have for it; the storage and the path below it."""
        full = Path(self._strip_protocol(path))
        storage = next((each for each in [full, *full.parents] if _beside(each, "faults").exists()), None)
        if storage is None:
            return None, ""
        name = _below(storage, full)
        _wait(storage, kind)
        faults = _read_faults(storage)
        if kind != "list" and _matches(name, faults.gone):
            raise FileNotFoundError(f"{path} is not there")
        if _is_to_fail(storage, faults, kind, name):
            raise ERRORS[faults.error]()
        return storage, name


fsspec.register_implementation(PROTOCOL, FaultyFileSystem, clobber=True)


def _wait(storage: Path, kind: str) -> None:
    deadline = time.monotonic() + MAX_SECONDS
    while kind in _read_faults(storage).held and time.monotonic() < deadline:
        time.sleep(0.01)
    if kind in ("put", "get") and (seconds := _read_faults(storage).slow_seconds):
        time.sleep(min(seconds, MAX_SECONDS))


def _is_to_fail(storage: Path, faults: Faults, kind: str, name: str) -> bool:
    with _counting(storage) as numbers:
        numbers[kind] = numbers.get(kind, 0) + 1
        share, num_failed = faults.failing.get(kind, 0.0), numbers.get(f"{kind} failed", 0)
        is_over = faults.num_failures is not None and num_failed >= faults.num_failures
        # The text is hashed by Random itself, the same in every process.
        drawn = random.Random(f"{faults.seed} {kind} {numbers[kind]}").random()
        is_failing = not is_over and drawn < share and fnmatch.fnmatchcase(name, faults.only)
        numbers[f"{kind} failed"] = num_failed + is_failing
    return is_failing


@contextmanager
def _counting(storage: Path) -> Iterator[dict[str, int]]:
    """The counts, to be changed; ranks and threads change them one after another."""
    with _beside(storage, "counts").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        numbers = json.loads(file.read() or "{}")
        yield numbers
        file.seek(0)
        file.truncate()
        file.write(json.dumps(numbers))


def _read_faults(storage: Path) -> Faults:
    return Faults(**json.loads(_beside(storage, "faults").read_text()))


def _beside(directory: Path, what: str) -> Path:
    return directory.parent / f"{directory.name}.{what}.json"


def _below(storage: Path, path: str | Path) -> str:
    return "" if Path(path) == storage else str(Path(path).relative_to(storage))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

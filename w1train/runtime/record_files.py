"""metrics.jsonl and samples.jsonl: one JSON object a line, appended while training. A resume removes the records of later steps.

NaN and infinite values, which JSON cannot express, are written as null, and ``nonfinite`` has their names:
``{"loss": null, "nonfinite": {"loss": "nan"}}``, and ``"loss_by_t/3"`` for an element of a list. Every line is then valid JSON for any
reader, a null that means "not measured" differs from an overflow, and :func:`read_metrics` returns the original float.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from w1train.config.constraints import LARGEST_INTEGER
from w1train.config.errors import UserError
from w1train.config.reading import LARGEST_JSON, parse_json, require_regular, shorten
from w1train.runtime.files import errors_named, open_in_place, replace_file, sync_file

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def encode_record(record: Record) -> bytes:
    """Encode a record as one line with its newline. Floats are written in the shortest form that reads back bit for bit."""
    nonfinite: dict[str, str] = {}
    clean: Record = {}
    for key, value in record.items():
        if isinstance(value, list | tuple):
            clean[key] = [_finite_or_null(f"{key}/{index}", item, nonfinite) for index, item in enumerate(value)]
        else:
            clean[key] = _finite_or_null(key, value, nonfinite)
    if nonfinite:
        clean["nonfinite"] = nonfinite
    text = json.dumps(clean, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate has no UTF-8 form. backslashreplace writes \udXXX, which is also its JSON escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def decode_record(line: bytes) -> Record:
    """Decode what :func:`encode_record` has written.

    Raises:
        ValueError: the line is not a JSON object, or its ``nonfinite`` names values that it does not have.
    """
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, not {type(record).__name__}")
    nonfinite = record.pop("nonfinite", {})
    try:
        for name, value in nonfinite.items():
            key, _, index = name.rpartition("/")
            if name in record:
                record[name] = float(value)
            else:
                record[key][int(index)] = float(value)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"its nonfinite is {shorten(nonfinite)}") from error
    return record


def _finite_or_null(name: str, value: Any, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[name] = repr(float(value))
        return None
    return value


class MetricsLog:
    """A writer that appends to a file, which belongs to one process.

    Opening an existing file drops an incomplete last line (of a process that died while writing), so that the next record begins a new
    line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._drop_torn_tail()
        self._file = open_in_place(self.path, "ab")

    def append(self, record: Record) -> None:
        """Write one record and pass it to the operating system. It then survives the end of this process.

        Raises:
            TypeError: JSON cannot express a value.
            OSError: no space.
        """
        assert isinstance(record.get("step"), int), f"a record needs an integer step: {record}"
        self._file.write(encode_record(record))
        self._file.flush()

    def newest(self) -> Record | None:
        """Return the last record, or None if it cannot be read or there is no record."""
        with open(self.path, "rb") as file, errors_named(self.path):
            _, line = _last_line(file)
        try:
            return decode_record(line)
        except ValueError:
            return None

    def sync(self) -> None:
        """Wait until everything is on disk. This is called before a checkpoint becomes visible. Otherwise a power cut could keep the
        checkpoint and lose the records before it, and a resume would not write them again."""
        sync_file(self._file)

    def truncate_after(self, step: int) -> int:
        """Drop the records of later steps than ``step`` (the checkpoint's), which the resumed run writes again.

        The other records stay as they are, byte for byte. After a crash the file has all records or only those that stay.

        Returns:
            The number of records that were dropped.

        Raises:
            ValueError: a line in the middle is not a record.
        """
        self._file.close()
        num_dropped = 0
        with replace_file(self.path) as kept:
            for line, record in _iter_lines(self.path):
                if record["step"] <= step:
                    kept.write(line)
                else:
                    num_dropped += 1
        self._file = open_in_place(self.path, "ab")
        if num_dropped:
            where = f"after step {step}" if step >= 0 else "of a start that saved nothing"
            logger.info("%s: dropped %d records %s; they are written again", self.path, num_dropped, where)
        return num_dropped

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drop_torn_tail(self) -> None:
        """Make the file end in a newline: cut a torn last line, or complete a last line that lacks only its newline."""
        with open_in_place(self.path, "r+b") as file:
            start, tail = _last_line(file)
            if not tail or tail.endswith(b"\n"):
                return
            if _is_record(tail):
                file.write(b"\n")
                return
            file.truncate(start)
        logger.warning("%s: dropped a torn last line of %d bytes", self.path, len(tail))


def read_metrics(path: str | Path, kind: str | None = None) -> list[Record]:
    """Return the records of a file in order, or only those of one ``kind`` ("train", "validation").

    An incomplete last line is left out, because the file may be read while a run writes to it.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: another line is not a record.
    """
    return [record for _, record in _iter_lines(Path(path)) if kind is None or record.get("kind") == kind]


def recorded_steps(path: str | Path, kind: str) -> set[int]:
    """Return the steps of the records of one ``kind``. The records are not all held in memory: a run of months has gigabytes of them."""
    return {record["step"] for _, record in _iter_lines(Path(path)) if record.get("kind") == kind}


def _iter_lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield (line with its newline, record) for every whole record of the file."""
    require_regular(path)
    with open(path, "rb") as file, errors_named(path):
        # At most one byte more than is allowed is read: a file without line breaks may be large.
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_JSON + 1), b""), start=1):
            try:
                if len(line) > LARGEST_JSON:
                    raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
                record = decode_record(line)
                if type(step := record.get("step")) is not int or not 0 <= step <= LARGEST_INTEGER:
                    raise ValueError("it has no step, an integer from 0")
            except ValueError as error:
                if not line.endswith(b"\n") and len(line) <= LARGEST_JSON:
                    return
                raise UserError(f"{path}, line {number}, is not a record ({error}): {line[:80]!r}") from error
            yield line if line.endswith(b"\n") else line + b"\n", record


def _is_record(line: bytes) -> bool:
    try:
        decode_record(line)
    except ValueError:
        return False
    return True


def _last_line(file: BinaryIO) -> tuple[int, bytes]:
    """Return (offset, bytes) of the last line. The file is read from its end, since a long run's is large, and its position is then the
    end."""
    size = file.seek(0, os.SEEK_END)
    length = min(size, 1 << 16)
    while True:
        file.seek(size - length)
        tail = file.read(length)
        newline = tail.rfind(b"\n", 0, -1)
        if newline >= 0 or length == size:
            return size - length + newline + 1, tail[newline + 1 :]
        length = min(size, 2 * length)

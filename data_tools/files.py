"""The files of a corpus: their names, the kind that each has by its name, and how large a part of a file may be."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Literal

from w1train.config.reading import FileContentError, read_json_object, shorten

logger = logging.getLogger(__name__)

Kind = Literal["text", "jsonl", "parquet", "arrow"]
KINDS: tuple[Kind, ...] = ("text", "jsonl", "parquet", "arrow")
_SUFFIXES: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
DATASET_SPLITS, DATASET_STATE = "dataset_dict.json", "state.json"
"""What Hugging Face's ``save_to_disk`` writes beside the .arrow files: of a dictionary of splits, of one dataset."""


_MOST_NAMES = 5
"""The most missing files that a message names."""


class CorpusError(ValueError):
    """A corpus that is missing, empty or not text."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on what must be in memory at once of a corpus, in bytes, decompressed."""

    document: int = 32 << 20
    """The most bytes of a document: a text file or a piece of one that is split, a line of JSONL or a cell of a table. The tokenizer
    library needs about 130 times the length of a text in memory, which makes this default 4 GB for each worker; the longest books have a
    third of it."""
    row_group: int = 2 << 30
    """The most bytes of a row group of Parquet or a record batch of Arrow, counting the columns that are read, or of a text file that is
    split. The default is what the 32-bit offsets of a column of strings reach."""


def document_fault(num_bytes: int | None, limit: int) -> str:
    """Describe what is wrong with a text file, a line or a cell over the limit; ``num_bytes`` is None where its length is not known."""
    found = f"more than the limit of {limit} bytes" if num_bytes is None else f"{num_bytes} bytes, over the limit of {limit}"
    return f"the document has {found} (--max-document-size)"


def split_text_fault(num_bytes: int | None, limit: int) -> str:
    """Describe what is wrong with a text file that is split and over the limit."""
    found = f"more than the limit of {limit} bytes" if num_bytes is None else f"{num_bytes} bytes, over the limit of {limit}"
    return f"the file has {found} (--max-row-group-size)"


def kind_of(path: str) -> Kind:
    """By the name's ending, that of a compression left out; text if it says nothing else."""
    stem, suffix = os.path.splitext(path)
    if suffix in _COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return _SUFFIXES.get(suffix, "text")


def compression_of(path: str) -> str | None:
    """gzip or zstd, by the name's ending; None for a file that is not compressed."""
    return _COMPRESSIONS.get(os.path.splitext(path)[1])


def broken_link(path: str | Path) -> str | None:
    """What is wrong with a symbolic link that leads nowhere; None if the path is none."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"{path} is a symbolic link to {os.readlink(path)}, which is not there"
    return None


def find_files(path: Path, extensions: Sequence[str] = ()) -> list[str]:
    """A file itself; of a directory the files below it, and links that lead nowhere, sorted by path, hidden entries left out.

    A directory that Hugging Face's ``save_to_disk`` wrote gives its .arrow files alone.

    Raises:
        CorpusError: if there is no such file or directory, or a dataset's split is not named.
    """
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        if fault := broken_link(path):
            raise CorpusError(f"corpus {fault}")
        raise CorpusError(f"corpus {path} does not exist" if not path.exists() else f"corpus {path} is neither a file nor a directory")
    files: list[str] = []
    num_irregular, links = 0, []
    for directory, subdirectories, names in os.walk(path, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        if DATASET_SPLITS in names:
            raise CorpusError(f"{directory} holds the splits {', '.join(sorted(subdirectories))} of a dataset: name the one to read")
        if DATASET_STATE in names and any(name.endswith(".arrow") for name in names):
            subdirectories[:], names = [], _dataset_files(Path(directory))
        links += [link for name in subdirectories if os.path.islink(link := os.path.join(directory, name))]
        for name in names:
            if name.startswith(".") or not name.endswith(tuple(extensions) or ""):
                continue
            file = os.path.join(directory, name)
            if broken_link(file) or S_ISREG(os.stat(file).st_mode):  # reading a pipe would wait for ever
                files.append(file)
            else:
                num_irregular += 1
    if num_irregular:
        logger.warning("left out %d entries of %s that are no regular files", num_irregular, path)
    if links:  # followed, one to a directory above it would never end
        logger.warning("left out %d links to directories, such as %s: name them with --input to read them", len(links), min(links))
    return sorted(files, key=lambda file: file.split(os.sep))


def _dataset_files(directory: Path) -> list[str]:
    """The .arrow files of a saved Hugging Face dataset; others in the directory are remains, or say how rows were chosen."""
    try:
        state = read_json_object(directory / DATASET_STATE, "state of a Hugging Face dataset")
        names = [entry["filename"] for entry in state["_data_files"]]
        chosen = state.get("_indices_data_files")
    except FileContentError as error:
        raise CorpusError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{directory / DATASET_STATE} is not what a Hugging Face dataset has there: {error!r}") from error
    if chosen:
        raise CorpusError(f"the dataset {directory} is a selection of its rows: save it again after flatten_indices()")
    if bad := [name for name in names if not isinstance(name, str) or "/" in name or not (directory / name).is_file()]:
        raise CorpusError(f"the dataset {directory} lacks {', '.join(map(shorten, bad[:_MOST_NAMES]))}")
    return names


def _raise(error: OSError) -> None:
    """A directory that cannot be listed is an error (os.walk would pass over it)."""
    raise error

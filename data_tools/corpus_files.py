"""The files of a corpus: how they are found, what their names say about their content, and how large their parts may be."""

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
"""The files that Hugging Face's ``save_to_disk`` writes in addition to .arrow files: for a dictionary of splits, and for one dataset."""


_MOST_NAMES = 5
"""The most missing files that a message names."""


class CorpusError(ValueError):
    """The error of a corpus that is missing, empty or not text."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits on how much of a corpus must be in memory at once, in decompressed bytes."""

    document: int = 32 << 20
    """The most bytes of a document: of a text file or a piece of a split text file, a line of JSONL, or a cell of a table. The tokenizer
    library takes about 130 bytes of memory for each byte of a text, so a document of the default size takes 4 GB in each worker. The
    longest books have a third of the default size."""
    row_group: int = 2 << 30
    """The most bytes of a row group of Parquet or a record batch of Arrow, counting the columns that are read, or of a text file that is
    split. The default is the largest column of strings that 32-bit offsets can address."""


def document_fault(num_bytes: int | None, limit: int) -> str:
    """Describe what is wrong with a text file, a line or a cell over the limit; ``num_bytes`` is None where its length is not known."""
    found = f"more than the limit of {limit} bytes" if num_bytes is None else f"{num_bytes} bytes, over the limit of {limit}"
    return f"the document has {found} (--max-document-size)"


def split_text_fault(num_bytes: int | None, limit: int) -> str:
    """Describe what is wrong with a text file that is split and over the limit."""
    found = f"more than the limit of {limit} bytes" if num_bytes is None else f"{num_bytes} bytes, over the limit of {limit}"
    return f"the file has {found} (--max-row-group-size)"


def kind_of(path: str) -> Kind:
    """Return what a file holds by the ending of its name, without the ending of a compression; text for all other endings."""
    stem, suffix = os.path.splitext(path)
    if suffix in _COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return _SUFFIXES.get(suffix, "text")


def compression_of(path: str) -> str | None:
    """Return "gzip" or "zstd" by the ending of a name; None for a file that is not compressed."""
    return _COMPRESSIONS.get(os.path.splitext(path)[1])


def broken_link(path: str | Path) -> str | None:
    """Describe a broken symbolic link; return None if the path is not a broken link."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"{path} is a symbolic link to {os.readlink(path)}, which is not there"
    return None


def find_files(path: Path, extensions: Sequence[str] = ()) -> list[str]:
    """Return the files that a path stands for: the file itself, or the files and broken links below the directory, sorted by path.

    Hidden entries are left out. A directory that Hugging Face's ``save_to_disk`` wrote gives only its .arrow files.

    Raises:
        CorpusError: if the path does not exist, or is a dataset with several splits.
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
            if broken_link(file) or S_ISREG(os.stat(file).st_mode):  # a read from a pipe would never end
                files.append(file)
            else:
                num_irregular += 1
    if num_irregular:
        logger.warning("left out %d entries of %s that are not regular files", num_irregular, path)
    if links:  # they are not followed, since following a link to a directory above it would never end
        logger.warning("left out %d links to directories, such as %s: name them with --input to read them", len(links), min(links))
    return sorted(files, key=lambda file: file.split(os.sep))


def _dataset_files(directory: Path) -> list[str]:
    """Return the names of the .arrow files of a saved Hugging Face dataset. Other .arrow files in the directory are remains, or only record
    which rows were chosen."""
    try:
        state = read_json_object(directory / DATASET_STATE, "state of a Hugging Face dataset")
        names = [entry["filename"] for entry in state["_data_files"]]
        chosen = state.get("_indices_data_files")
    except FileContentError as error:
        raise CorpusError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{directory / DATASET_STATE} is not the state of a Hugging Face dataset: {error!r}") from error
    if chosen:
        raise CorpusError(f"the dataset {directory} is a selection of its rows: save it again after flatten_indices()")
    if bad := [name for name in names if not isinstance(name, str) or "/" in name or not (directory / name).is_file()]:
        raise CorpusError(f"the dataset {directory} lacks {', '.join(map(shorten, bad[:_MOST_NAMES]))}")
    return names


def _raise(error: OSError) -> None:
    """Raise the error of a directory that cannot be listed, which os.walk would ignore."""
    raise error

"""The files of a corpus: how they are found, and how large their parts may be."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from data_tools.own_files import own_file
from w1train.config.reading import FileContentError, read_json_object, shorten
from w1train.data.text.file_names import CorpusError

logger = logging.getLogger(__name__)

DATASET_SPLITS, DATASET_STATE = "dataset_dict.json", "state.json"
"""The files that Hugging Face's ``save_to_disk`` writes in addition to .arrow files: for a dictionary of splits, and for one dataset."""


_MOST_NAMES = 5
"""The most missing files that a message names."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits on how much of a corpus must be in memory at once, in decompressed bytes."""

    document: int = 32 << 20
    """The most bytes of a document: of a text file or a piece of a split text file, a line of JSONL, or a cell of a table. The tokenizer
    library takes about 130 bytes of memory for each byte of a text, so a document of the default size takes 4 GB in each worker. The
    longest books have a third of the default size."""
    row_group: int = 2 << 30
    """The most bytes of a row group of Parquet or a record batch of Arrow, counting the columns that are read, or of a text file that is
    split. The default is the largest column of strings that 32-bit offsets can address. The window of a compressed file may have as many
    bytes."""


def document_fault(num_bytes: int | None, limit: int) -> str:
    """Describe what is wrong with a text file, a line or a cell over the limit; ``num_bytes`` is None where its length is not known."""
    found = f"more than the limit of {limit} bytes" if num_bytes is None else f"{num_bytes} bytes, over the limit of {limit}"
    return f"the document has {found} (--max-document-size)"


def split_text_fault(num_bytes: int | None, limit: int) -> str:
    """Describe what is wrong with a text file that is split and over the limit."""
    found = f"more than the limit of {limit} bytes" if num_bytes is None else f"{num_bytes} bytes, over the limit of {limit}"
    return f"the file has {found} (--max-row-group-size)"


def broken_link(path: str | Path) -> str | None:
    """Describe a broken symbolic link; return None if the path is not a broken link."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"{path} is a symbolic link to {os.readlink(path)}, which is not there"
    return None


def find_files(path: Path, extensions: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Return the files that a path stands for (the file itself, or the files and broken links below the directory, sorted by path), and the
    DATASET_STATE files that tell which files these are.

    Hidden entries are left out, and so are files that w1train writes (tokenizers, datasets). A directory that Hugging Face's
    ``save_to_disk`` wrote gives only its .arrow files.

    Args:
        extensions: the endings of the files to take from a directory, in upper or lower case.

    Raises:
        CorpusError: if the path does not exist, is a dataset with several splits, or names a file that w1train writes.
    """
    if path.is_file():
        if own := own_file(str(path)):
            raise CorpusError(f"{path} is {own}, not a corpus: leave it out of --input")
        return [str(path)], []
    if not path.is_dir():
        if fault := broken_link(path):
            raise CorpusError(f"corpus {fault}")
        raise CorpusError(f"corpus {path} does not exist" if not path.exists() else f"corpus {path} is neither a file nor a directory")
    endings = tuple(extension.lower() for extension in extensions) or ""
    files: list[str] = []
    states: list[str] = []
    num_irregular, links, own_files = 0, [], []
    for directory, subdirectories, names in os.walk(path, onerror=_raise):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        if DATASET_SPLITS in names:
            raise CorpusError(f"{directory} holds the splits {', '.join(sorted(subdirectories))} of a dataset: name the one to read")
        if DATASET_STATE in names and any(name.endswith(".arrow") for name in names):
            subdirectories[:], names = [], _dataset_files(Path(directory))
            states.append(os.path.join(directory, DATASET_STATE))
        links += [link for name in subdirectories if os.path.islink(link := os.path.join(directory, name))]
        for name in names:
            if name.startswith(".") or not name.lower().endswith(endings):
                continue
            file = os.path.join(directory, name)
            if not broken_link(file) and not S_ISREG(os.stat(file).st_mode):  # a read from a pipe would never end
                num_irregular += 1
            elif own := own_file(file):
                own_files.append(f"{file} ({own})")
            else:
                files.append(file)
    _warn(path, num_irregular, links, own_files)
    return sorted(files, key=lambda file: file.split(os.sep)), states


def _warn(path: Path, num_irregular: int, links: Sequence[str], own_files: Sequence[str]) -> None:
    """Log the entries of a directory that are not read."""
    if num_irregular:
        logger.warning("left out %d entries of %s that are not regular files", num_irregular, path)
    if links:  # they are not followed, since following a link to a directory above it would never end
        logger.warning("left out %d links to directories, such as %s: name them with --input to read them", len(links), min(links))
    if own_files:
        listed = ", ".join(sorted(own_files)[:_MOST_NAMES])
        logger.warning("left out %d files of %s that are not text but files of w1train: %s", len(own_files), path, listed)


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

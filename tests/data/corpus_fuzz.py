"""Random small corpora with known counts, which data_tools.tokenize must find: each document is read, skipped for its reason, or an error.

``python -m tests.data.corpus_fuzz 1000`` tries so many of them, and prints how many documents there were of each kind.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import json
import logging
import lzma
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from data_tools import tokenize
from data_tools.outputs import Outputs
from data_tools.units import Position
from w1train.data.dataset import TokenDataset
from w1train.data.tokenizer import Tokenizer, train_tokenizer

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd").compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
LARGEST = 6000
"""The limit on a document in bytes, and nothing else is near it."""
MARK = "\ufeff"
_REASONS = {"empty": "num_empty", "bad": "num_bad", "too_large": "num_too_large", "filtered": "num_filtered", "twice": "num_duplicates"}
FIELDS = {"text": ["text"], "doc.text": ["doc", "text"], "doc.body.text": ["doc", "body", "text"]}


@dataclass
class Corpus:
    """The files of a corpus, and what is in them."""

    field_name: str
    has_filter: bool
    deduplicates: bool
    files: dict[str, bytes] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    """The documents that are read, in order."""
    expected: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, content: bytes, outcomes: Sequence[tuple[str, str]]) -> None:
        """Add a file, and for each of its documents (the outcome, the text)."""
        self.files[name] = content
        for outcome, text in outcomes:
            is_twice = outcome == "read" and self.deduplicates and text in self.texts
            self.expected["twice" if is_twice else outcome] += 1
            if outcome == "read" and not is_twice:
                self.texts.append(text)


def draw_text(draw: random.Random) -> tuple[str, str]:
    """(outcome, text)."""
    kind = draw.choices(["read", "empty", "too_large", "marked"], [12, 2, 1, 2])[0]
    words = [draw.choice(["cat", "na\u00efve", "\N{SNOWMAN}", "a\tb", '"quoted"', "[x],{y}", "back\\slash", "line\nfeed", "a\u2028b", "7"])]
    words += [draw.choice("abcdefgh") * draw.randint(1, 4) for _ in range(draw.randint(0, 12))]
    text = "again" if draw.random() < 0.2 else " ".join(words)
    if kind == "empty":
        return "empty", draw.choice(["", " ", "\n\t ", MARK])
    if kind == "too_large":
        return "too_large", text + "x" * LARGEST
    return "read", f"{MARK}{text}" if kind == "marked" else text


def stripped(text: str) -> str:
    return text.removeprefix(MARK)


def record_of(corpus: Corpus, text: object, language: str) -> dict:
    value = text
    for part in reversed(FIELDS[corpus.field_name]):
        value = {part: value}
    assert isinstance(value, dict)
    return {**value, "lang": language, "n": 1}


def draw_record(draw: random.Random, corpus: Corpus) -> tuple[str, str, dict]:
    """(outcome, text without a mark, record) of a record that a table can have, too."""
    outcome, text = draw_text(draw)
    language = draw.choice(["en", "en", "de"])
    if draw.random() < 0.1:
        return "bad", "", record_of(corpus, None, language)
    if corpus.has_filter and language == "de" and outcome != "too_large":
        outcome = "filtered"
    return outcome, stripped(text), record_of(corpus, text, language)


def bad_line(draw: random.Random, corpus: Corpus) -> bytes:
    return draw.choice(
        [
            b'{"text": ',
            b"null",
            b'"text"',
            b"[1]",
            b"{}",
            b'{"text": "caf\xe9", "lang": "en"}',
            json.dumps(record_of(corpus, 7, "en")).encode(),
            json.dumps(record_of(corpus, ["list"], "en")).encode(),
            json.dumps(record_of(corpus, "\ud800", "en")).encode(),
        ]
    )


def add_lines(draw: random.Random, corpus: Corpus, name: str) -> None:
    lines, outcomes = [], []
    for _ in range(draw.randint(1, 7)):
        outcome, text, record = draw_record(draw, corpus)
        if draw.random() < 0.15:
            lines.append(bad_line(draw, corpus))
            outcomes.append(("bad", ""))
            continue
        if outcome != "too_large" and draw.random() < 0.1:
            lines.append(draw.choice([b"", b"  ", b"\t"]))
            outcomes.append(("empty", ""))
            continue
        line = json.dumps(record, ensure_ascii=draw.random() < 0.5)
        if draw.random() < 0.1:  # which Python does not convert
            line = f'{line[:-1]}, "huge": {"7" * 5000}}}'
        lines.append((MARK if draw.random() < 0.1 else "").encode() + line.encode())
        outcomes.append((outcome, text))
    content = draw.choice([b"\n", b"\r\n"]).join(lines)
    suffix = draw.choice([".jsonl", ".JSONL", ".jsonlines", ".ndjson"])
    has_end = draw.random() < 0.5 or not lines[-1].strip()
    _add_packed(draw, corpus, name + suffix, content + b"\n" * has_end, outcomes)


def add_array(draw: random.Random, corpus: Corpus, name: str) -> None:
    """An array of records, or records in lines, under a name for both."""
    records, outcomes = [], []
    for _ in range(draw.randint(1, 6)):
        outcome, text, record = draw_record(draw, corpus)
        if draw.random() < 0.1:
            outcome, text, record = "bad", "", draw.choice([[], 3, "text", None, {"a": ["]", "}"]}])
        records.append(record)
        outcomes.append((outcome, text))
    layout = draw.choice(["array", "indented", "lines"])
    if layout == "lines":
        first = record_of(corpus, "first", "en")
        content = "".join(json.dumps(record) + "\n" for record in [first, *records])
        outcomes.insert(0, ("read", "first"))
    else:
        content = json.dumps(records, indent=draw.choice([1, 2]) if layout == "indented" else None)
    content += "\n" * draw.randint(0, 2) if layout != "lines" else ""
    mark = MARK if draw.random() < 0.2 else ""
    _add_packed(draw, corpus, name + draw.choice([".json", ".JSON"]), (mark + content).encode(), outcomes)


def add_table(draw: random.Random, corpus: Corpus, name: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [draw_record(draw, corpus) for _ in range(draw.randint(1, 8))]
    records = [record for _, _, record in rows]
    has_field = draw.random() < 0.8
    schema = pa.schema([_arrow_field(FIELDS[corpus.field_name]), ("lang", pa.string()), ("n", pa.int64())])
    table = pa.Table.from_pylist(records, schema=schema)
    if not has_field:
        table = pa.table({"other": ["x"] * len(rows), "lang": ["en"] * len(rows), "doc": [{"other": "x"}] * len(rows)})
    outcomes = [(outcome, text) if has_field else ("bad", "") for outcome, text, _ in rows]
    sink = io.BytesIO()
    kind = draw.choice(["parquet", "file", "stream"])
    if kind == "parquet":
        parquet.write_table(table, sink, row_group_size=draw.randint(1, 5))
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=draw.randint(1, 5))
    corpus.add(name + (draw.choice([".parquet", ".PARQUET"]) if kind == "parquet" else ".arrow"), sink.getvalue(), outcomes)


def _arrow_field(parts: Sequence[str]):
    import pyarrow as pa

    kind = pa.string()
    for part in reversed(parts[1:]):
        kind = pa.struct([(part, kind)])
    return pa.field(parts[0], kind)


def add_text(draw: random.Random, corpus: Corpus, name: str) -> None:
    outcome, text = draw_text(draw)
    content = text.encode()
    if draw.random() < 0.2:
        outcome = "bad"
        content = draw.choice(["text\u00e9".encode("latin-1"), "text".encode("utf-16"), json.dumps(record_of(corpus, "x", "en")).encode()])
    _add_packed(draw, corpus, name + draw.choice([".txt", ".md", ""]), content, [(outcome, stripped(text))])


def _add_packed(draw: random.Random, corpus: Corpus, name: str, content: bytes, outcomes: Sequence[tuple[str, str]]) -> None:
    suffix = draw.choice([*COMPRESSIONS, "", ""])
    packed = COMPRESSIONS[suffix](content)
    if suffix and draw.random() < 0.1:  # no byte of the content comes out of the first bytes of the file
        packed, outcomes = packed[: min(len(packed) // 2, 10)], [("bad", "")]
    corpus.add(name + (suffix.upper() if draw.random() < 0.1 else suffix), packed, outcomes)


def draw_corpus(draw: random.Random) -> Corpus:
    corpus = Corpus(draw.choice(list(FIELDS)), draw.random() < 0.4, draw.random() < 0.3)
    kinds = [add_lines, add_array, add_table] + ([] if corpus.has_filter else [add_text])
    for number in range(draw.randint(1, 5)):
        draw.choice(kinds)(draw, corpus, f"{number}")
    return corpus


def write_own_files(directory: Path, tokenizer: Tokenizer) -> None:
    """Files of w1train in the corpus, which are no documents."""
    tokenizer.save(directory / "tokenizer.json")
    (directory / "old.bin.partial").write_bytes(b"left over")


@contextmanager
def no_disk():
    """Nothing here survives a power cut, and the flushes would take most of the time."""
    with mock.patch.object(os, "fsync"):
        yield


@contextmanager
def stopped_after(num_records: int):
    """Stop the run when it has written so many records of progress."""
    write_record, left = Outputs.write_record, num_records

    def write(outputs: Outputs, position: Position, is_complete: bool = False) -> None:
        nonlocal left
        write_record(outputs, position, is_complete)
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with mock.patch.object(Outputs, "write_record", write):
        yield


def check(seed: int, tokenizer: Tokenizer) -> Counter[str]:
    """Try a corpus. Returns the number of documents by their outcome."""
    draw = random.Random(seed)
    corpus = draw_corpus(draw)
    num_faults = corpus.expected["bad"] + corpus.expected["too_large"]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "in").mkdir()
        for file, content in corpus.files.items():
            (directory / "in" / file).write_bytes(content)
        if draw.random() < 0.3:
            write_own_files(directory / "in", tokenizer)
        tokenizer.save(directory / "tokenizer.json")
        arguments = ["--input", f"{name}/in", "--tokenizer", f"{name}/tokenizer.json", "--output", f"{name}/x", "--workers", "1"]
        arguments += ["--text-field", corpus.field_name, "--max-document-size", str(LARGEST)]
        arguments += ["--filter", "lang=^en$"] * corpus.has_filter + ["--deduplicate"] * corpus.deduplicates
        failed = tokenize.main([*arguments, "--on-error", "fail"]) == 1
        is_empty = not corpus.expected["read"]
        assert failed == bool(num_faults or is_empty), f"seed {seed}: {corpus.expected}, and the status is {int(failed)}"
        arguments += ["--on-error", "skip", "--overwrite", "--record-seconds", "0"]
        with stopped_after(draw.randint(1, 2 * len(corpus.files))):
            tokenize.main(arguments)
        skipped = tokenize.main(arguments)
        assert skipped == int(is_empty), f"seed {seed}: {corpus.expected}, and the status is {skipped}"
        if not is_empty:
            dataset = TokenDataset.open(f"{name}/x", tokenizer)
            assert dataset.manifest is not None
            counts = dataset.manifest.corpus
            found = Counter({outcome: counts[key] for outcome, key in _REASONS.items()}, read=counts["num_documents"])
            assert +found == +corpus.expected, f"seed {seed}: found {found}, expected {corpus.expected}"
            texts = [tokenizer.decode(dataset.document_tokens(i).tolist()[:-1]) for i in range(dataset.num_documents)]
            assert texts == corpus.texts, f"seed {seed}"
    return corpus.expected


def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["a small corpus of text"] * 9, vocab_size=300)


def main(number: int) -> None:
    logging.disable(logging.ERROR)
    tokenizer, total = small_tokenizer(), Counter[str]()
    with no_disk():
        for seed in range(number):
            total += check(seed, tokenizer)
    print(f"{number} corpora, {total.total()} documents: {', '.join(f'{count} {outcome}' for outcome, count in sorted(total.items()))}")


if __name__ == "__main__":
    main(int(sys.argv[1]))

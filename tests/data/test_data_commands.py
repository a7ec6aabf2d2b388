"""The commands of data_tools, from text to datasets: split, errors, interruption."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import import_tokenizer, python_corpus, split, tokenize, train_tokenizer, verify
from data_tools.corpus import TextCorpus
from data_tools.encode import Encoding, UnitTokenizer
from data_tools.split import HashSplit
from data_tools.unit_reader import Document, Rules
from w1train.data.dataset import TokenDataset
from w1train.data.tokenizer import Tokenizer, TokenizerError

REPOSITORY = Path(__file__).parents[2]


def test_tokenizing_needs_no_torch():
    """torch takes seconds and half a gigabyte in each worker process."""
    script = "import sys; import data_tools.tokenize, data_tools.train_tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True, timeout=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """300 kB of the standard library's sources."""
    path = tmp_path_factory.mktemp("corpus") / "python.jsonl"
    assert python_corpus.main(["--output", str(path), "--max-bytes", "300000"]) == 0
    return path


@pytest.fixture(scope="module")
def tokenizer_file(corpus):
    path = corpus.parent / "tokenizer.json"
    assert train_tokenizer.main(["--input", str(corpus), "--output", str(path), "--vocab-size", "600"]) == 0
    return path


def tokenize_arguments(corpus, tokenizer_file, prefix, *more):
    return ["--input", str(corpus), "--tokenizer", str(tokenizer_file), "--output", str(prefix), *more]


def read_texts(prefix, tokenizer) -> list[str]:
    dataset = TokenDataset.open(prefix, tokenizer, tokenizer.vocab_size)
    documents = [dataset.document_tokens(i).tolist() for i in range(dataset.num_documents)]
    assert all(ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1] for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def test_the_standard_library_is_a_corpus(corpus):
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert 200_000 < sum(len(record["text"].encode()) for record in records) <= 300_000
    assert [record["path"] for record in records] == sorted(record["path"] for record in records)
    again = python_corpus.collect(Path(os.__file__).parent, 300_000)
    assert again == [(record["path"], record["text"]) for record in records]
    assert not any("site-packages" in path or path.startswith("test/") for path, _ in again)


def test_tables_are_no_code(tmp_path):
    left_out = ["encodings/cp437.py", "html/entities.py", "_sysconfigdata__linux_.py", "test/test_os.py", "lib/site-packages/a.py"]
    kept = ["codecs.py", "html/parser.py", "sysconfig.py"]
    for name in [*left_out, *kept]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    assert [path for path, _ in python_corpus.collect(tmp_path)] == kept


def test_a_tokenizer_says_what_it_was_trained_on(corpus, tokenizer_file):
    manifest = json.loads((tokenizer_file.parent / "tokenizer.manifest.json").read_text())
    assert manifest["sha256"] == Tokenizer.load(tokenizer_file).fingerprint
    assert manifest["vocab_size"] == 600
    facts = manifest["corpus"]
    assert facts["num_bytes"] == corpus.stat().st_size
    assert facts["num_documents"] + facts["num_empty"] == len(corpus.read_text().splitlines())
    assert facts["options"]["digits"] == "single"


def test_from_text_to_datasets_and_back(corpus, tokenizer_file, tmp_path):
    """Train and validation together hold every document, unchanged, once."""
    options = ["--validation-output", str(tmp_path / "new/validation"), "--validation-fraction", "0.2"]
    assert tokenize.main(tokenize_arguments(corpus, tokenizer_file, tmp_path / "new/train", *options)) == 0
    tokenizer = Tokenizer.load(tokenizer_file)
    train, validation = (read_texts(tmp_path / "new" / name, tokenizer) for name in ("train", "validation"))
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    texts = [text for text in texts if text.strip()]
    assert sorted(train + validation) == sorted(texts)
    assert train == [text for text in texts if not split.is_validation(text, 0.2)]
    assert 0 < len(validation) < len(train)
    for name, part in (("train", train), ("validation", validation)):
        manifest = TokenDataset.open(tmp_path / "new" / name).manifest
        assert manifest is not None
        assert manifest.num_bytes == sum(len(text.encode()) for text in part)


def test_the_split_takes_the_fraction_asked_for():
    texts = [f"document {i}" for i in range(4000)]
    num_held_out = sum(split.is_validation(text, 0.1) for text in texts)
    assert abs(num_held_out - 400) < 76  # 4 standard deviations
    assert all(split.is_validation(text, 0.3) for text in texts if split.is_validation(text, 0.1))
    assert not any(split.is_validation(text, 0.0) for text in texts)


def test_same_input_same_files(corpus, tokenizer_file, tmp_path):
    for name in ("one", "two"):
        assert tokenize.main(tokenize_arguments(corpus, tokenizer_file, tmp_path / name)) == 0
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_verify_finds_damage_of_the_right_size(corpus, tokenizer_file, tmp_path, caplog):
    prefix = tmp_path / "x"
    assert tokenize.main(tokenize_arguments(corpus, tokenizer_file, prefix)) == 0
    assert verify.main([str(prefix)]) == 0
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(path.stat().st_size))
    assert verify.main([str(prefix)]) == 1
    assert f"{path} is corrupt" in caplog.text


def test_an_existing_dataset_is_kept_unless_overwritten(corpus, tokenizer_file, tmp_path, caplog):
    arguments = tokenize_arguments(corpus, tokenizer_file, tmp_path / "x")
    assert tokenize.main(arguments) == 0
    before = (tmp_path / "x.json").stat().st_mtime_ns
    assert tokenize.main(arguments) == 1
    assert "x.json, " in caplog.text
    assert "exist already: choose another name, or give --overwrite" in caplog.text
    assert (tmp_path / "x.json").stat().st_mtime_ns == before
    assert tokenize.main([*arguments, "--overwrite"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


LINES = [f"line {i} of a text\n" for i in range(200)]
FEW_DOCUMENTS = {
    "one file": ["".join(LINES)],
    "two files": ["".join(LINES[:150]), "".join(LINES[150:])],
    "the last file is one line": ["".join(LINES[:199]), "".join(LINES[199:])],
    "only single lines": LINES[:4],
    "the cut falls into a long line": ["x" * 1000, LINES[0]],
    "white space at the end": ["one\ntwo\n" + 500 * "\n"],
    "lines of other characters": ["\N{SNOWMAN}" * 90 + "\n" + "\N{SNOWMAN}" * 10],
}


@pytest.mark.parametrize("texts", FEW_DOCUMENTS.values(), ids=FEW_DOCUMENTS)
def test_of_few_documents_the_last_lines_are_held_out(tokenizer_file, tmp_path, caplog, texts):
    assert not any(split.is_validation(text, 0.001) for text in texts), "the case would not be tested"
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    tokenizer = Tokenizer.load(tokenizer_file)
    for fraction in (0.001, 0.1):
        corpus = TextCorpus(sorted(tmp_path.glob("*.txt")))
        cut = split.TailSplit(corpus_bytes(texts), len(texts), fraction)
        pieces = [piece for document in corpus for piece in cut(document)]
        sides = [held_out for _, held_out in pieces]
        assert sides == sorted(sides)
        assert set(sides) == {False, True}
        assert "".join(piece.text for piece, _ in pieces) == "".join(texts)
        assert all(piece.text.strip() and piece.num_bytes == len(piece.text.encode()) for piece, _ in pieces)
        held_out_bytes = sum(piece.num_bytes for piece, held_out in pieces if held_out)
        longest_line = max(len(line.encode()) for text in texts for line in text.rstrip().splitlines())
        slack = longest_line + max(len(text) - len(text.rstrip()) for text in texts)
        assert abs(held_out_bytes - fraction * corpus_bytes(texts)) <= slack
    options = ["--validation-output", str(tmp_path / "validation"), "--validation-fraction", "0.001"]
    files = sorted(map(str, tmp_path.glob("*.txt")))
    arguments = ["--input", *files, "--tokenizer", str(tokenizer_file), "--output", str(tmp_path / "train"), *options]
    with caplog.at_level("INFO"):
        assert tokenize.main(arguments) == 0
    assert "is held out for validation instead" in caplog.text
    assert "".join(read_texts(tmp_path / "train", tokenizer) + read_texts(tmp_path / "validation", tokenizer)) == "".join(texts)


def corpus_bytes(texts) -> int:
    return sum(len(text.encode()) for text in texts)


def test_one_line_cannot_be_split(tokenizer_file, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("the only document\n")
    options = ["--validation-output", str(tmp_path / "validation"), "--validation-fraction", "0.000001"]
    assert tokenize.main(tokenize_arguments(tmp_path / "a.txt", tokenizer_file, tmp_path / "train", *options)) == 1
    assert "a.txt is a single line and the only document" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_search_for_both_sides_ends_with_them():
    """A large corpus is not read twice."""
    documents = (Document(f"document {i}", "", 10) for i in range(10**9))
    assert isinstance(split.choose_split(documents, 0.01), split.HashSplit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation-fraction", "0.1"], "must be given together"),
        (["--validation-output", "v"], "must be given together"),
        (["--validation-output", "v", "--validation-fraction", "1.5"], r"must be in [0, 1), not 1.5"),
        (["--shard-size", "1e3"], "argument --shard-size: must be a whole number, at least 1, not '1e3'"),
        (["--workers", "0"], "argument --workers: must be a whole number, at least 1, not '0'"),
    ],
)
def test_options_that_are_wrong_or_do_not_go_together(options, message, capsys):
    with pytest.raises(SystemExit):
        tokenize.main(tokenize_arguments("c", "t", "p", *options))
    assert message in capsys.readouterr().err


INPUTS = {
    "tokenize": (tokenize, "--input", ["--tokenizer", "t", "--output", "p"]),
    "tokenize, the tokenizer": (tokenize, "--tokenizer", ["--input", "c", "--output", "p"]),
    "train_tokenizer": (train_tokenizer, "--input", ["--output", "t.json"]),
    "import_tokenizer": (import_tokenizer, "--input", ["--output", "t.json", "--eos", "e"]),
}


@pytest.mark.parametrize("case", INPUTS.values(), ids=INPUTS)
def test_an_empty_path_is_not_the_directory_that_one_is_in(tmp_path, monkeypatch, capsys, case):
    command, option, others = case
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("not meant")
    with pytest.raises(SystemExit, match="2"):
        command.main([*others, option, ""])
    assert f"argument {option}: the path is empty (an unset variable?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "the path is empty"), ("o/", "'o/' names a directory"), (".", "'.' names a directory"), ("o/..", "'o/..' names a directory")],
)
def test_outputs_have_a_name(tmp_path, monkeypatch, capsys, path, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    commands = {
        tokenize: tokenize_arguments("a.txt", "t", path),
        train_tokenizer: ["--input", "a.txt", "--output", path],
        import_tokenizer: ["--input", "t", "--eos", "e", "--output", path],
        python_corpus: ["--output", path, "--max-bytes", "1000"],
    }
    for command, arguments in commands.items():
        with pytest.raises(SystemExit, match="2"):
            command.main(arguments)
        assert f"argument --output: {message}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tokenize.main(tokenize_arguments("a.txt", "t", "p", "--validation-output", path, "--validation-fraction", "0.1"))
    assert f"argument --validation-output: {message}" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_directory_is_no_tokenizer_to_write(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(SystemExit, match="2"):
        train_tokenizer.main(["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path)])
    assert "names a directory: the name of a file is needed" in capsys.readouterr().err


def test_a_document_that_the_tokenizer_cannot_encode_is_named_or_left_out(tokenizer_file, tmp_path, monkeypatch, caplog):
    encode_batch = Tokenizer.encode_batch

    def gives_up(self, texts):
        if any("blanks" in text for text in texts):
            raise TokenizerError("the text has too many blanks")
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", gives_up)
    texts = ["first", "  blanks  ", " ", "second"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = tokenize_arguments(tmp_path / "a.jsonl", tokenizer_file, tmp_path / "out", "--workers", "1")
    assert tokenize.main(arguments) == 1
    assert "a.jsonl:2: the text has too many blanks (--on-error skip leaves such input out)" in caplog.text
    worker = UnitTokenizer(Encoding(Rules(), Path(tokenizer_file).read_bytes(), HashSplit(0), deduplicate=False))
    error = worker(next(TextCorpus([tmp_path / "a.jsonl"]).units())).text.error
    assert "a.jsonl:2: the text has too many blanks" in str(error), "an exception would end a worker that is a process"
    caplog.clear()
    assert tokenize.main([*arguments, "--on-error", "skip"]) == 0
    assert "left out: " in caplog.text
    assert "a.jsonl:2: the text has too many blanks" in caplog.text
    assert read_texts(tmp_path / "out", Tokenizer.load(tokenizer_file)) == ["first", "second"]
    counts = json.loads((tmp_path / "out.json").read_text())["corpus"]
    assert [counts[name] for name in ("num_documents", "num_bad", "num_empty")] == [2, 1, 1]


@pytest.mark.parametrize("other", ["o/x", "./o//x", "o/../o/x", "link/x"])
def test_one_dataset_cannot_be_both(tmp_path, monkeypatch, capsys, other):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("o")
    with pytest.raises(SystemExit, match="2"):
        tokenize.main(tokenize_arguments("c", "t", "o/x", "--validation-output", other, "--validation-fraction", "0.1"))
    assert f"--output o/x and --validation-output {other} are the same dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "the corpus is empty"), (b"caf\xe9", r"byte 3 (0xe9) is not UTF-8")],
)
def test_unusable_corpora_end_with_a_message(tokenizer_file, tmp_path, caplog, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    commands = {
        tokenize: tokenize_arguments(path, tokenizer_file, tmp_path / "x"),
        train_tokenizer: ["--input", str(path), "--output", str(tmp_path / "t.json")],
    }
    for command, arguments in commands.items():
        caplog.clear()
        assert command.main(arguments) == 1
        assert message in caplog.text
    assert [entry for entry in tmp_path.iterdir() if entry != path] == []


def test_sizes_may_have_underscores(tokenizer_file, tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    assert tokenize.main(tokenize_arguments(tmp_path / "a.txt", tokenizer_file, tmp_path / "x", "--shard-size", "5_000")) == 0


def test_a_link_that_leads_nowhere(tokenizer_file, tmp_path, caplog):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for name in ("a.txt", "c.txt"):
        (directory / name).write_text(name)
    (directory / "b.txt").symlink_to("gone.txt")
    (directory / "d.jsonl").symlink_to("d.jsonl")
    arguments = tokenize_arguments(directory, tokenizer_file, tmp_path / "x")
    for command in ((tokenize, arguments), (train_tokenizer, ["--input", str(directory), "--output", str(tmp_path / "t.json")])):
        caplog.clear()
        assert command[0].main(command[1]) == 1
        message = f"{directory}/b.txt is a symbolic link to gone.txt, which is not there (--on-error skip leaves such input out)"
        assert message in caplog.text
        with caplog.at_level("INFO"):
            assert command[0].main([*command[1], "--on-error", "skip"]) == 0
        assert f"left out: {directory}/b.txt is a symbolic link to gone.txt, which is not there" in caplog.text
        assert f"left out: {directory}/d.jsonl is a symbolic link to d.jsonl" in caplog.text
        assert "left out 2 files or lines that are not text" in caplog.text
    assert read_texts(tmp_path / "x", Tokenizer.load(tokenizer_file)) == ["a.txt", "c.txt"]
    assert json.loads((tmp_path / "x.json").read_text())["corpus"]["num_bad"] == 2
    assert tokenize.main(tokenize_arguments(directory / "b.txt", tokenizer_file, tmp_path / "y", "--on-error", "skip")) == 1
    assert f"corpus {directory}/b.txt is a symbolic link to gone.txt" in caplog.text


def test_options_of_the_corpus_may_be_repeated(tokenizer_file, tmp_path):
    """Each adds to those before it."""
    for name in ("a.txt", "b.md", "c.rst"):
        (tmp_path / name).write_text(name)
    output = tmp_path / "out/x"
    assert tokenize.main(tokenize_arguments(tmp_path / "a.txt", tokenizer_file, output, "--input", str(tmp_path / "c.rst"))) == 0
    assert read_texts(output, Tokenizer.load(tokenizer_file)) == ["a.txt", "c.rst"]
    extensions = ["--extensions", ".txt", "--extensions", ".md", "--overwrite"]
    assert tokenize.main(tokenize_arguments(tmp_path, tokenizer_file, output, *extensions)) == 0
    assert read_texts(output, Tokenizer.load(tokenizer_file)) == ["a.txt", "b.md"]


def test_skipped_input_is_counted(tokenizer_file, tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"coffee")
    with caplog.at_level("INFO"):
        assert tokenize.main(tokenize_arguments(tmp_path, tokenizer_file, tmp_path / "out/x", "--on-error", "skip")) == 0
    assert "left out 1 files or lines that are not text" in caplog.text
    assert read_texts(tmp_path / "out/x", Tokenizer.load(tokenizer_file)) == ["coffee"]


def start_tokenize(arguments, **options):
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "data_tools.tokenize", *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def large_corpus(corpus, tmp_path_factory):
    """2.4 MB: three batches of the command, so that it has written some when it is killed."""
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    path.write_bytes(corpus.read_bytes() * 8)
    return path


@pytest.mark.slow
def test_kill_leaves_nothing_under_the_name_and_a_second_run_is_as_if_undisturbed(large_corpus, tokenizer_file, tmp_path):
    arguments = tokenize_arguments(large_corpus, tokenizer_file, tmp_path / "killed/x")
    process = start_tokenize(arguments)
    partial = tmp_path / "killed/x.bin.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left - {"x.progress.partial", "x.progress.partial.partial"} == {"x.bin.partial", "x.idx.partial", "x.hashes.partial"}

    assert tokenize.main(arguments) == 0
    assert tokenize.main(tokenize_arguments(large_corpus, tokenizer_file, tmp_path / "undisturbed/x")) == 0
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"killed/x{suffix}").read_bytes() == (tmp_path / f"undisturbed/x{suffix}").read_bytes()
    assert len(list((tmp_path / "killed").iterdir())) == 3


def test_no_space_left_leaves_nothing(large_corpus, tokenizer_file, tmp_path):
    """A limit on the size of files stands in for the full disk: the write fails the same way, with an OSError."""
    process = start_tokenize(
        tokenize_arguments(large_corpus, tokenizer_file, tmp_path / "x"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "File too large" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []

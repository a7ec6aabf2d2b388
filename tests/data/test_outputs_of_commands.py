"""Commands of the data tools lose no file that they were not asked to replace."""

from __future__ import annotations

import json
import shutil
import sysconfig

import pytest

from data_tools import import_tokenizer, inspect, python_corpus, tokenize, train_tokenizer
from data_tools.outputs import output_paths

LINES = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(20))
TRAIN = ["--vocab-size", "300"]
VALIDATION = ["--validation-fraction", "0.5"]


@pytest.fixture
def files(tokenizer, tmp_path, monkeypatch):
    """Inputs under the names that a command could write."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save(tmp_path / "t.json")
    for name in ("x.json", "x.bin", "x_00003.idx"):
        (tmp_path / name).write_text(LINES)
    assert tokenize.main(["--input", "x.bin", "--format", "jsonl", "--tokenizer", "t.json", "--output", "d"]) == 0
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "saved/data.arrow").write_bytes(b"a table")
    return tmp_path


def snapshot(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def corpus(name):
    return ["--input", name, "--format", "jsonl"]


OVER_INPUTS = {
    **{
        f"tokenize {name}": (tokenize, [*corpus(name), "--tokenizer", "t.json", "--output", "x", "--overwrite"])
        for name in ("x.json", "./x.bin")
    },
    "tokenize a shard": (
        tokenize,
        [*corpus("x_00003.idx"), "--tokenizer", "t.json", "--output", "x", "--shard-size", "9", "--overwrite"],
    ),
    "tokenize the tokenizer": (tokenize, [*corpus("x.bin"), "--tokenizer", "t.json", "--output", "t", "--overwrite"]),
    "tokenize validation": (
        tokenize,
        [
            *corpus("x.bin"),
            "--tokenizer",
            "t.json",
            "--output",
            "n",
            "--validation-output",
            "x",
            "--validation-fraction",
            "0.5",
            "--overwrite",
        ],
    ),
    "train_tokenizer": (train_tokenizer, [*corpus("x.json"), "--output", "x.json", *TRAIN, "--overwrite"]),
    "tokenize the state": (tokenize, ["--input", "saved", "--tokenizer", "t.json", "--output", "saved/state", "--overwrite"]),
    "train_tokenizer the state": (train_tokenizer, ["--input", "saved", "--output", "./saved/state.json", *TRAIN, "--overwrite"]),
    "import_tokenizer": (import_tokenizer, ["--input", ".", "--eos", "<eos>", "--output", "tokenizer.json", "--overwrite"]),
    "inspect the page": (inspect, ["d", "--html", "d.idx", "--overwrite"]),
    "inspect the picture": (inspect, ["d", "--tokenizer", "t.json", "--svg", "t.json", "--overwrite"]),
}
EXISTING = {
    "tokenize": (tokenize, [*corpus("x.json"), "--tokenizer", "t.json", "--output", "x"]),
    "train_tokenizer": (train_tokenizer, [*corpus("x.json"), "--output", "t.json", *TRAIN]),
    "import_tokenizer": (import_tokenizer, ["--input", "tokenizer.json", "--eos", "<eos>", "--output", "t.json"]),
    "inspect": (inspect, ["d", "--html", "x.bin"]),
    "python_corpus": (python_corpus, ["--output", "x.json", "--max-bytes", "1000"]),
}


@pytest.mark.parametrize(("command", "arguments"), OVER_INPUTS.values(), ids=OVER_INPUTS)
def test_no_output_is_an_input(files, caplog, command, arguments):
    shutil.copy("t.json", "tokenizer.json")
    before = snapshot(files)
    assert command.main(arguments) == 1
    assert "is the input" in caplog.text
    assert snapshot(files) == before


def test_a_corpus_of_sources_replaces_no_source(tmp_path, caplog, monkeypatch):
    (tmp_path / "module.py").write_text("pass")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: tmp_path)
    assert python_corpus.main(["--output", str(tmp_path / "module.py"), "--overwrite"]) == 1
    assert "is the input" in caplog.text
    assert (tmp_path / "module.py").read_text() == "pass"


@pytest.mark.parametrize(("command", "arguments"), EXISTING.values(), ids=EXISTING)
def test_what_exists_is_kept(files, caplog, command, arguments):
    shutil.copy("t.json", "tokenizer.json")
    if command is tokenize:  # two files that are no dataset of ours
        arguments = [argument.replace("x.json", "d.json.txt") for argument in arguments]
        (files / "x.json").rename("d.json.txt")
    before = snapshot(files)
    assert command.main(arguments) == 1
    assert "already: choose another name, or give --overwrite" in caplog.text
    assert snapshot(files) == before
    assert command.main([*arguments, "--overwrite"]) == 0
    assert snapshot(files) != before


def test_a_tokenizer_in_the_corpus_has_a_name_that_shows_it(files, caplog):
    (files / "corpus").mkdir()
    (files / "x.json").rename("corpus/x.jsonl")
    assert train_tokenizer.main(["--input", "corpus", "--output", "corpus/new/tokenizer", *TRAIN]) == 1
    assert "would be read as a text: call it tokenizer.json" in caplog.text
    assert [path.name for path in (files / "corpus").iterdir()] == ["x.jsonl"]
    outside = ["--input", "corpus", "--extensions", ".jsonl", "--output", "corpus/new/tokenizer", *TRAIN]
    assert train_tokenizer.main(outside) == 0


def test_files_of_w1train_in_a_corpus_are_no_text(files, caplog):
    """Also when the data is made in the corpus's own directory, and made again."""
    (files / "corpus").mkdir()
    (files / "x.json").rename("corpus/x.jsonl")
    assert train_tokenizer.main(["--input", "corpus", "--output", "corpus/tokenizer.json", *TRAIN]) == 0
    arguments = ["--input", "corpus", "--tokenizer", "corpus/tokenizer.json", "--output", "corpus/train"]
    for more in ([], ["--overwrite"], ["--overwrite", "--shard-size", "30"]):
        caplog.clear()
        (files / "corpus/train.idx.partial").write_bytes(b"of a run that was killed")
        assert tokenize.main([*arguments, *more]) == 0
        assert "that are not text but files of w1train" in caplog.text
        assert "corpus/tokenizer.json (a tokenizer)" in caplog.text
    name = output_paths("corpus/train", in_shards=True)[0]
    assert json.loads(name.read_text())["corpus"]["num_files"] == 1
    assert json.loads((files / "corpus/train.json").read_text())["num_documents"] == 20
    assert tokenize.main([*arguments, "--input", "corpus/tokenizer.manifest.json"]) == 1
    assert "is the manifest of a tokenizer, not a corpus" in caplog.text


def test_the_manifest_of_a_tokenizer_that_was_removed_is_replaced(files):
    arguments = [*corpus("x.json"), "--output", "new.json", *TRAIN]
    assert train_tokenizer.main(arguments) == 0
    (files / "new.json").unlink()
    assert train_tokenizer.main(arguments) == 0
    (files / "new.json").unlink()
    (files / "new.manifest.json").write_text("{}")
    assert train_tokenizer.main(arguments) == 1

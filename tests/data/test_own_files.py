"""The files that w1train writes, which are told from others of the same names by their content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_tools.corpus_files import find_files
from data_tools.own_files import own_file
from w1train.data.packed.packing_index import PackingOptions, ensure_packing


def test_every_file_of_a_dataset_is_recognised(make_dataset, tokenizer, tmp_path, caplog):
    dataset = make_dataset(tmp_path / "x", [[20, 21]] * 8)
    (tmp_path / "x.may_be_noised").write_bytes(bytes([1] * dataset.num_tokens))
    packing = ensure_packing(dataset, PackingOptions(sequence_length=8))
    tokenizer.save(tmp_path / "tokenizer.json")
    found = {path.suffix: own_file(str(path)) for path in (packing, *(Path(f"{dataset.prefix}{end}") for end in (".bin", ".idx", ".json")))}
    assert found == {
        ".pack": "a packing of a dataset",
        ".bin": "a file of a dataset",
        ".idx": "the index of a dataset",
        ".json": "the manifest of a dataset",
    }
    assert own_file(f"{dataset.prefix}.may_be_noised") == "a file of a dataset"
    shutil.copy(packing, f"{packing}.node1.17.partial")
    shutil.copy(tmp_path / "tokenizer.json", tmp_path / "tokenizer.json.partial")
    (tmp_path / "text.txt").write_text("a text")
    assert find_files(tmp_path)[0] == [str(tmp_path / "text.txt")]
    assert "left out 8 files" in caplog.text


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".may_be_noised", ".progress", ".hashes", ".pack", ".progress.partial"])
def test_unfinished_files_of_a_dataset_are_recognised_by_name(tmp_path, suffix):
    path = tmp_path / f"x{suffix}.partial"
    path.write_text("left over")
    assert own_file(str(path)) == "a file that is still being written"


@pytest.mark.parametrize("name", ["x.bin", "x.idx", "x.may_be_noised", "x.pack", "x.json", "notes.json.partial", "x.partial", "x.hashes"])
@pytest.mark.parametrize("content", ["notes", '{"text": "a"}'])
def test_files_of_others_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert own_file(str(tmp_path / name)) is None


@pytest.mark.parametrize("indent", [None, 2])
def test_a_tokenizer_with_sorted_keys_is_recognised(tokenizer, tmp_path, indent):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.serialized), indent=indent, sort_keys=True))
    assert own_file(str(path)) == "a tokenizer"
    path.write_text(json.dumps({"added_tokens": ["content"], "text": "a"}, indent=indent))
    assert own_file(str(path)) is None

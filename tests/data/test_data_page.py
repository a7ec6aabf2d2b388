"""The commands of docs/data.md, one after the other, on a small corpus."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from tests.data.conftest import TEXTS
from tests.test_readme import shell_commands
from w1train.cli import DATA_VERBS
from w1train.data.dataset import TokenDataset

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def write_checkpoint(directory: Path, special_tokens: list[str]) -> None:
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))


def test_the_commands_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoints" / "Qwen3-1.7B-Base", ["<|endoftext|>"])
    write_checkpoint(tmp_path / "checkpoints" / "llama", ["<|end_of_text|>", "<|reserved_special_token_0|>"])
    (tmp_path / "corpus").mkdir()
    records = [
        {"text": text, "content": {"text": text * 5}, "lang": "en" if i % 2 else "de", "score": i / 50} for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "corpus" / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*records, *records]))
    for command in shell_commands(PAGE.read_text()):
        program, folder, verb, *words = shlex.split(command)
        assert (program, folder) == ("w1train", "data")
        if "--workers" in words:
            words[words.index("--workers") + 1] = "1"
        assert importlib.import_module(DATA_VERBS[verb].module).main(words) == 0, command
    train, english = TokenDataset.open("data/train"), TokenDataset.open("data/english_00000")
    # The last document is cut, and its end is for validation: neither part of it had been there before.
    assert train.manifest.corpus["num_duplicates"] == len(TEXTS) - 1
    assert english.num_documents == 2 * sum(record["lang"] == "en" and str(record["score"])[:3] in ("0.8", "0.9") for record in records)

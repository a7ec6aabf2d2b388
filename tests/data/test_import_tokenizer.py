"""A model's own tokenizer, made one to train with: ids stay, special tokens are there."""

import hashlib
import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools import import_tokenizer
from w1train.data.tokenizers.tokenizer import Tokenizer as TrainingTokenizer

TEXT = "def main(argument):\n    return argument + 12  # a comment\n"


@pytest.fixture
def qwen_like(tmp_path):
    """Byte-level BPE whose special tokens are added behind the merges, under names of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|im_start|>", special=True)])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def run(source, target, *options):
    return import_tokenizer.main(["--input", str(source), "--output", str(target), *options])


def test_ids_stay_and_special_tokens_are_there(qwen_like, tmp_path):
    before = Tokenizer.from_file(str(qwen_like))
    assert run(qwen_like, tmp_path / "new" / "tokenizer.json", "--eos", "<|endoftext|>") == 0
    after = TrainingTokenizer.load(tmp_path / "new" / "tokenizer.json")
    assert after.encode(TEXT) == before.encode(TEXT).ids
    assert after.decode(after.encode(TEXT)) == TEXT
    assert after.eos_token_id == before.token_to_id("<|endoftext|>")
    size = before.get_vocab_size()
    assert (after.mask_token_id, after.pad_token_id) == (size, size + 1)
    assert after.encode("<mask> <eos>") != [after.mask_token_id], "special tokens are no text"
    assert int(after.num_bytes_by_token()[after.encode(TEXT)].sum()) == len(TEXT)
    manifest = json.loads((tmp_path / "new" / "tokenizer.manifest.json").read_text())
    assert (manifest["sha256"], manifest["mask_token_id"], manifest["vocab_size"]) == (after.fingerprint, size, after.vocab_size)
    assert manifest["source_sha256"] == hashlib.sha256(qwen_like.read_bytes()).hexdigest()


def test_a_token_that_nothing_uses_becomes_the_mask(qwen_like, tmp_path):
    before = Tokenizer.from_file(str(qwen_like))
    assert run(qwen_like.parent, tmp_path / "new.json", "--eos", "<|endoftext|>", "--mask", "<|im_start|>") == 0
    after = TrainingTokenizer.load(tmp_path / "new.json")
    assert (after.mask_token_id, after.pad_token_id) == (before.token_to_id("<|im_start|>"), before.get_vocab_size())
    assert after.encode(TEXT) == before.encode(TEXT).ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eos", "<|endoftext|>", "--mask", "<|endoftext|>"], "must be different tokens"),
        (["--eos", "<|endoftext|>", "--pad", "[PAD]"], r"has no special token [PAD]"),
        (["--eos", "</s>"], r"has no special token </s>; it has: <|endoftext|>, <|im_start|>"),
        (["--eos", "<|endoftext|>", "--mask-token-id", "5"], "--mask-token-id 5 is "),
        (["--eos", "<|endoftext|>", "--mask-token-id", "9000"], "leaves ids without a token before it"),
    ],
)
def test_mistakes_are_said(qwen_like, tmp_path, caplog, options, message):
    assert run(qwen_like, tmp_path / "out.json", *options) == 1
    assert message in caplog.text
    assert not (tmp_path / "out.json").exists()


def test_a_broken_file_is_said(tmp_path, caplog):
    source = tmp_path / "tokenizer.json"
    source.write_text(json.dumps({"model": {}})[:5])
    assert run(source, tmp_path / "out.json", "--eos", "x") == 1
    assert "is not a tokenizer.json" in caplog.text

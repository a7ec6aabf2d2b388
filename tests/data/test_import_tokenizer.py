"""A model's own tokenizer, made one to train with: ids stay, special tokens are there."""

import hashlib
import json
import os
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools import import_tokenizer, inspect, tokenize
from w1train.data.dataset import TokenDataset
from w1train.data.tokenizer import Tokenizer as TrainingTokenizer

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


def test_the_manifest_names_a_directory_that_is_not_utf_8(qwen_like, tmp_path):
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes(qwen_like.read_bytes())
    arguments = ["--input", str(directory), "--eos", "<|endoftext|>", "--output", str(tmp_path / "out.json")]
    assert import_tokenizer.main(arguments) == 0
    assert json.loads((tmp_path / "out.manifest.json").read_text())["source"] == str(directory / "tokenizer.json")


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
        (["--eos", "<|endoftext|>", "--mask-token-id", "16777216"], "--mask-token-id 16777216 is not an id"),
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


WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran"]
KINDS = {
    "BPE": ({"merges": []}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
    "WordLevel": ({"unk_token": "[UNK]"}, {"type": "Whitespace"}),
    "WordPiece": ({"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}, {"type": "Whitespace"}),
}
SPECIAL = ["<|end|>", "<|one|>", "<|two|>"]
SENTENCES = ["the cat sat", "a mat, and 12 cats ran <|end|> on", "on <|two|>the mat <mask>"]


def with_holes(kind, seed, in_vocabulary):
    """Return a tokenizer.json whose ids, those of the special tokens too, are anywhere below three times their number."""
    generator = random.Random(seed)
    model, steps = KINDS[kind]
    tokens = {"BPE": [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"], "WordLevel": [*WORDS, "[UNK]"]}
    tokens["WordPiece"] = [*tokens["WordLevel"], "##s", "##t", "c", "##a"]
    model = {**model, **({"merges": ["t h", "th e"]} if kind == "BPE" else {})}
    texts = [*tokens[kind], *SPECIAL]
    ids = dict(zip(texts, generator.sample(range(3 * len(texts)), len(texts)), strict=True))
    outside = [] if in_vocabulary else SPECIAL
    vocabulary = {text: number for text, number in ids.items() if text not in outside}
    added = [import_tokenizer._special_token(ids[text], text) for text in SPECIAL]
    generator.shuffle(added)
    parts = {"normalizer": None, "post_processor": None, "decoder": None, "truncation": None, "padding": None}
    content = {"version": "1.0", **parts, "added_tokens": added, "pre_tokenizer": steps}
    return {**content, "model": {"type": kind, **model, "vocab": vocabulary}}, ids


def library(content, ids):
    """The library's tokenizer of a file in which every token is in the vocabulary, so that the library keeps all ids."""
    backend = Tokenizer.from_str(json.dumps({**content, "model": {**content["model"], "vocab": ids}}))
    backend.encode_special_tokens = True
    return backend


@pytest.mark.parametrize("in_vocabulary", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_stay_where_a_vocabulary_has_holes(kind, in_vocabulary, tmp_path):
    for seed in range(12):
        content, ids = with_holes(kind, seed, in_vocabulary)
        source = tmp_path / "source.json"
        source.write_text(json.dumps(content))
        holes = sorted(set(range(max(ids.values()))) - {*ids.values()})
        wanted = [None, holes[0], holes[-1], max(ids.values()) + 1, max(ids.values()) + 50][seed % 5]
        options = [] if wanted is None else ["--mask-token-id", str(wanted)]
        assert run(source, tmp_path / "new.json", "--overwrite", "--eos", "<|end|>", *options) == 0
        after = TrainingTokenizer.load(tmp_path / "new.json")
        first_free = max(ids.values()) + 1
        mask = first_free if wanted is None else wanted
        pad = first_free + (mask == first_free)
        expected = {("<eos>" if text == "<|end|>" else text): number for text, number in ids.items()}
        assert after.ids_by_token() == {**expected, "<mask>": mask, "<pad>": pad}
        assert (after.eos_token_id, after.mask_token_id, after.pad_token_id) == (ids["<|end|>"], mask, pad)
        assert after.vocab_size == max(mask, pad) + 1
        oracle = library(content, ids)
        for text in SENTENCES:
            assert after.encode(text) == oracle.encode(text, add_special_tokens=False).ids
            assert {after.eos_token_id, mask, pad}.isdisjoint(after.encode(text))
        every = [number for number in sorted(ids.values()) if number != ids["<|end|>"]]
        assert after.decode(every) == oracle.decode(every, skip_special_tokens=False)
        assert "<mask>" in after.decode([mask])


def test_a_dataset_of_few_tokens_with_high_ids(qwen_like, tmp_path):
    """Ids above 65,535 do not fit into two bytes, however few tokens there are."""
    content = json.loads(qwen_like.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {text: number if number < 100 else number + 100_000 for text, number in vocabulary.items()}
    for number, token in enumerate(content["added_tokens"]):
        token["id"] = 150_000 + 7 * number
    qwen_like.write_text(json.dumps(content))
    assert run(qwen_like, tmp_path / "new.json", "--eos", "<|endoftext|>") == 0
    after = TrainingTokenizer.load(tmp_path / "new.json")
    assert (after.eos_token_id, after.vocab_size) == (150_000, 150_010)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    prefix = str(tmp_path / "data")
    arguments = ["--input", str(tmp_path / "text.jsonl"), "--tokenizer", str(tmp_path / "new.json"), "--output", prefix]
    assert tokenize.main(arguments) == 0
    dataset = TokenDataset.open(prefix, after, after.vocab_size)
    assert dataset.document_tokens(0).tolist() == [*after.encode(TEXT), 150_000]
    assert inspect.check_tokens(dataset, after).problem == inspect.check_tokens(dataset, None).problem == ""
    num_bytes = after.num_bytes_by_token()
    assert len(num_bytes) == after.vocab_size
    assert num_bytes[after.encode(TEXT)].sum() == len(TEXT)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"vocab": {"<mask>": 400}}, [], "<mask> is an ordinary token (id 400)"),
        ({"added": {"<mask>": 400}}, ["--mask-token-id", "500"], "--mask-token-id 500 cannot be kept: <mask> of"),
        ({"added": {"<mask>": 400}}, ["--mask", "<|im_start|>"], "already has a token <mask> (id 400): give --mask <mask>"),
        ({"added": {"<eos>": 400}}, [], "already has a token <eos> (id 400): give --eos <eos>"),
        ({"added": {"<|endoftext|>": 400}}, [], "for the token '<|endoftext|>'"),
        ({"vocab": {"other": "<|endoftext|>"}}, [], "the same id"),
        ({}, ["--mask-token-id", "-1"], "--mask-token-id -1 is not an id"),
    ],
    ids=str,
)
def test_special_tokens_that_would_not_be_their_own(qwen_like, tmp_path, caplog, change, options, message):
    content = json.loads(qwen_like.read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    content["model"]["vocab"] |= {text: ids.get(number, number) for text, number in change.get("vocab", {}).items()}
    content["added_tokens"] += [import_tokenizer._special_token(number, text) for text, number in change.get("added", {}).items()]
    qwen_like.write_text(json.dumps(content))
    assert run(qwen_like, tmp_path / "out.json", "--eos", "<|endoftext|>", *options) == 1
    assert message in caplog.text
    assert not (tmp_path / "out.json").exists()


def test_tokens_that_have_the_names_already_stay(qwen_like, tmp_path):
    """As Gemma's."""
    content = json.loads(qwen_like.read_text())
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    content["added_tokens"] += [import_tokenizer._special_token(400 + number, name) for number, name in enumerate(names)]
    qwen_like.write_text(json.dumps(content))
    assert run(qwen_like, tmp_path / "new.json", "--eos", "<eos>", "--mask-token-id", "404") == 0
    after = TrainingTokenizer.load(tmp_path / "new.json")
    assert (after.pad_token_id, after.eos_token_id, after.mask_token_id, after.vocab_size) == (400, 401, 404, 405)


def test_the_token_of_unknown_characters_is_not_renamed(tmp_path, caplog):
    content, _ = with_holes("WordLevel", 0, in_vocabulary=True)
    content["added_tokens"].append(import_tokenizer._special_token(content["model"]["vocab"]["[UNK]"], "[UNK]"))
    (tmp_path / "source.json").write_text(json.dumps(content))
    assert run(tmp_path / "source.json", tmp_path / "new.json", "--eos", "[UNK]") == 1
    assert "[UNK] stands for unknown characters" in caplog.text


def test_the_file_names_no_token_that_was_renamed(qwen_like, tmp_path):
    content = json.loads(qwen_like.read_text())
    end = next(token["id"] for token in content["added_tokens"] if token["content"] == "<|endoftext|>")
    content["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": end, "pad_type_id": 0}
    content["padding"]["pad_token"] = "<|endoftext|>"
    content["post_processor"] = {"type": "BertProcessing", "sep": ["<|endoftext|>", end], "cls": ["<|im_start|>", end + 1]}
    content["model"]["unk_token"] = "<|endoftext|>"
    content["model"]["vocab"]["<|endoftext|>"] = end
    qwen_like.write_text(json.dumps(content))
    assert run(qwen_like, tmp_path / "new.json", "--eos", "<|endoftext|>") == 0
    assert "<|endoftext|>" not in (tmp_path / "new.json").read_text()


def test_a_text_that_becomes_a_special_token_is_said(tmp_path, caplog):
    """Words between blanks are looked up in the vocabulary as they are."""
    content, _ = with_holes("WordLevel", 1, in_vocabulary=True)
    content["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "source.json").write_text(json.dumps(content))
    assert run(tmp_path / "source.json", tmp_path / "new.json", "--eos", "<|end|>") == 1
    assert "would have gaps, so <mask>, <pad> must be in the vocabulary of its model" in caplog.text
    assert not (tmp_path / "new.json").exists()
    ids = {text: number for number, text in enumerate(content["model"]["vocab"])}
    content["model"]["vocab"] = ids
    content["added_tokens"] = [import_tokenizer._special_token(ids[text], text) for text in SPECIAL]
    (tmp_path / "source.json").write_text(json.dumps(content))
    assert run(tmp_path / "source.json", tmp_path / "new.json", "--eos", "<|end|>") == 0
    assert "encodes a text that contains <eos> as the special token" in caplog.text


@pytest.mark.parametrize("looks_up", [False, True])
def test_a_name_that_is_a_whole_piece_is_tried(tmp_path, caplog, looks_up):
    """A model with ignore_merges looks up each piece as it is, here a whole text."""
    content, _ = with_holes("BPE", 2, in_vocabulary=False)
    content["pre_tokenizer"]["use_regex"] = False
    content["model"]["ignore_merges"] = looks_up
    (tmp_path / "source.json").write_text(json.dumps(content))
    assert run(tmp_path / "source.json", tmp_path / "new.json", "--eos", "<|end|>") == int(looks_up)
    assert ("would have gaps, so <eos>, <mask>, <pad> must" in caplog.text) == looks_up


def test_a_list_of_tokens_is_refused(tmp_path, caplog):
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    content = {"version": "1.0", "added_tokens": [import_tokenizer._special_token(0, "<unk>")], "model": model}
    (tmp_path / "source.json").write_text(json.dumps(content))
    assert run(tmp_path / "source.json", tmp_path / "new.json", "--eos", "<unk>") == 1
    assert "Unigram models cannot be imported" in caplog.text

"""Any text comes back; special tokens cannot be smuggled in; the same texts give the same file."""

from __future__ import annotations

import hashlib
import json
import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tests.data.conftest import TEXTS
from w1train.data.tokenizer import Tokenizer, TokenizerError, _panics_of, train_tokenizer

NUM_SPECIAL = 16
SPECIAL_STRINGS = ["<mask>", "<eos>", "<pad>", "<bos>", "<reserved_7>"]


@given(st.text())
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.one_of(st.sampled_from(SPECIAL_STRINGS), st.text(max_size=5))).map("".join))
def test_special_tokens_in_text_stay_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(token_id >= NUM_SPECIAL for token_id in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_text_that_is_not_unicode_is_refused(tokenizer):
    """As an argument in Latin-1 comes."""
    with pytest.raises(TokenizerError, match=r"'a.udcff' is not Unicode: character 1 is a lone surrogate"):
        tokenizer.encode("a\udcff")


def test_every_byte_has_a_token(tokenizer):
    """Bytes that the corpus never showed, too: no text can be out of vocabulary."""
    vocabulary = tokenizer._backend.get_vocab()
    byte_ids = [vocabulary[character] for character in pre_tokenizers.ByteLevel.alphabet()]
    assert sorted(byte_ids) == list(range(NUM_SPECIAL, NUM_SPECIAL + 256))


@pytest.mark.parametrize("mask_token_id", [3, 14, 15, 40])
def test_layout_of_special_tokens(mask_token_id):
    tokenizer = train_tokenizer(["some text"], vocab_size=300, mask_token_id=mask_token_id)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, mask_token_id)
    assert tokenizer.decode([2, mask_token_id, 0]) == "<bos><mask><pad>"
    assert min(tokenizer.encode("any text")) >= max(NUM_SPECIAL, mask_token_id + 1)


@pytest.mark.parametrize("mask_token_id", [272, 300, 308, 309])
def test_a_mask_at_a_high_id(mask_token_id, tmp_path):
    """As LLaDA's, 128 ids below the end of its vocabulary."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=310, mask_token_id=mask_token_id)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, mask_token_id)
    assert sorted(tokenizer._backend.get_vocab().values()) == list(range(310))
    plain = train_tokenizer(TEXTS, vocab_size=309)
    for text in (*TEXTS, "<mask> and other text \N{SNOWMAN}"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids == [token_id + (token_id >= mask_token_id) for token_id in plain.encode(text)]
    assert tokenizer.decode([mask_token_id, 1], skip_special=True) == ""
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").mask_token_id == mask_token_id


def test_a_mask_above_what_the_corpus_gives():
    with pytest.raises(TokenizerError, match=r"mask_token_id 126336 is too high: the corpus gave only 27. token ids"):
        train_tokenizer(["some text"], vocab_size=126464, mask_token_id=126336)


@pytest.mark.parametrize(
    ("vocab_size", "mask_token_id", "message"),
    [
        (300, 300, "too small"),
        (300, 2, "mask_token_id must be at least 3, not 2"),
        (271, 14, "vocab_size 271 is too small"),
        (300, 100, "need 357 ids"),
        (999_999_999, 14, "vocab_size 999999999 is too large: at most 16777216"),
        (300, 999_999_999, "mask_token_id 999999999 is too large: at most 16777215"),
    ],
)
def test_impossible_vocabularies_are_refused(vocab_size, mask_token_id, message):
    with pytest.raises(TokenizerError, match=message):
        train_tokenizer(["text"], vocab_size, mask_token_id)


def test_training_needs_text():
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer(iter([]), 300)


def test_same_texts_same_file_and_the_size_asked_for():
    words = ["".join(random.Random(seed).choices("abcdefgh", k=6)) for seed in range(300)]
    texts = [" ".join(random.Random(i).choices(words, k=200)) for i in range(20)]
    first, second = (train_tokenizer(texts, vocab_size=700) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 700


def test_a_poor_corpus_gives_fewer_ids_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert train_tokenizer(["abab"], vocab_size=1000).vocab_size < 300
    assert "of the 1000 asked for" in caplog.text


@given(text=st.text())
def test_bytes_are_counted_by_token(tokenizer, text):
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id]
    assert tokenizer.num_bytes_by_token()[ids].sum() == len(text.encode())


def test_bytes_of_another_kind_of_tokenizer_are_unknown(tokenizer):
    record = json.loads(tokenizer.serialized)
    record["model"]["vocab"]["\N{LOWER ONE EIGHTH BLOCK}the"] = tokenizer.vocab_size
    assert Tokenizer(json.dumps(record).encode(), "sentencepiece").num_bytes_by_token() is None


def test_every_digit_is_a_token(tokenizer):
    """Numbers then have one spelling; the texts above are full of 'value + 12' that would otherwise merge."""
    assert [tokenizer.decode([token_id]) for token_id in tokenizer.encode("+ 1234")] == ["+", " ", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("rules", "pieces"),
    [
        ({"digits": "triples"}, ["n", " =", " ", "123", "4", "\n\n   ", " x"]),
        ({"digits": "runs"}, ["n", " =", " 1234", "\n\n   ", " x"]),
        ({"whitespace": "lines"}, ["n", " =", " ", "1", "2", "3", "4", "\n\n", "   ", " x"]),
    ],
)
def test_other_rules_cut_other_pieces(rules, pieces):
    text = "n = 1234\n\n    x"
    tokenizer = train_tokenizer([text] * 3, vocab_size=400, **rules)
    encoded = [tokenizer.decode([token_id]) for token_id in tokenizer.encode(text)]
    assert encoded == pieces
    for other in ("", "\r\n \t x", "a\u00a0\u2028b 12 345", "<mask>"):
        assert tokenizer.decode(tokenizer.encode(other)) == other


def test_file_round_trip(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == tokenizer.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.encode("x <mask> = 12") == tokenizer.encode("x <mask> = 12")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.json"]


def test_decode(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.mask_token_id, *tokenizer.encode("b"), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "a<mask>b<eos>"
    assert tokenizer.decode(ids, skip_special=True) == "ab"
    with pytest.raises(TokenizerError, match="token id 300 is outside the vocabulary"):
        tokenizer.decode([300])


def test_files_that_are_no_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.load(path)
    path.write_bytes(b"\xff{")
    with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(path)
    content = json.loads(tokenizer.serialized)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<mask>"]
    del content["model"]["vocab"]["<mask>"]
    path.write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="no <mask> token"):
        Tokenizer.load(path)


def test_truncation_saved_in_a_file_is_not_applied(tokenizer, tmp_path):
    content = json.loads(tokenizer.serialized)
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).encode("a b c d e") == tokenizer.encode("a b c d e")


def _changed(tokenizer, ids=None, added=None):
    """Return the file of a tokenizer with other ids of tokens in its vocabulary, and with more added tokens."""
    content = json.loads(tokenizer.serialized)
    for token, number in (ids or {}).items():
        content["model"]["vocab"][token] = number
        for entry in content["added_tokens"]:
            entry["id"] = number if entry["content"] == token else entry["id"]
    content["added_tokens"] += [{**content["added_tokens"][0], "content": token, "id": number} for token, number in (added or {}).items()]
    return json.dumps(content).encode()


def test_the_bound_of_ids_is_the_largest_id_plus_one(tokenizer):
    found = Tokenizer(_changed(tokenizer, ids={"<mask>": 70_001, "<eos>": 500}), "holes")
    assert (found.vocab_size, found.mask_token_id, found.eos_token_id) == (70_002, 70_001, 500)
    assert len(found.num_bytes_by_token()) == 70_002
    assert found.decode([70_001, 14, 500]) == "<mask><eos>", "the id 14 has no token now"
    with pytest.raises(TokenizerError, match="token id 70002 is outside the vocabulary of holes"):
        found.decode([70_002])


@pytest.mark.parametrize(("token", "other"), [("<mask>", "<eos>"), ("<eos>", "<pad>"), ("<pad>", "a"), ("<mask>", "a")])
def test_a_special_token_with_the_id_of_another_token_is_refused(tokenizer, token, other):
    number = tokenizer.ids_by_token()[other]
    with pytest.raises(TokenizerError, match=rf"the same id, {number}; <pad>, <eos> and <mask> need ids of their own"):
        Tokenizer(_changed(tokenizer, ids={token: number}), "shared")


def test_an_id_that_the_library_does_not_keep_is_said(tokenizer, tmp_path, caplog):
    """The library reads no ids of added tokens: where the ids have a hole, it gives the token the id of another token or a free id."""
    path = tmp_path / "tokenizer.json"
    path.write_bytes(_changed(tokenizer, added={"<|extra|>": 900}))
    assert Tokenizer.load(path).vocab_size == tokenizer.vocab_size + 1
    assert f"states the id 900 for '<|extra|>', but the tokenizers library gives this token the id {tokenizer.vocab_size}" in caplog.text
    caplog.clear()
    path.write_bytes(_changed(tokenizer, added={"<|extra|>": tokenizer.vocab_size}))
    Tokenizer.load(path)
    assert not caplog.text


def test_ids_of_a_unigram_model():
    """Its vocabulary is a list. Added tokens come after it."""
    names = ["<unk>", "<pad>", "<eos>", "a", "b"]
    added = [{"id": number, "content": name, "special": True} for name, number in {"<pad>": 1, "<eos>": 2, "<mask>": 5, "<x>": 6}.items()]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    model = {"type": "Unigram", "unk_id": 0, "vocab": [[name, -float(number)] for number, name in enumerate(names)]}
    found = Tokenizer(json.dumps({"version": "1.0", "added_tokens": [{**flags, **token} for token in added], "model": model}).encode(), "u")
    assert (found.pad_token_id, found.eos_token_id, found.mask_token_id, found.vocab_size) == (1, 2, 5, 7)
    assert found.encode("ab") == [3, 4]


def test_a_text_that_the_regular_expressions_give_up_on(tokenizer):
    """The library panics for ten million blanks before a word, where the expression of the rule "lines", or of Qwen, tries each blank."""

    class PanicException(BaseException):
        """The library's class has this name."""

    with (
        pytest.raises(TokenizerError, match="a text has a run of millions of blanks, which is too long for its regular expressions; cut"),
        _panics_of("t"),
    ):
        raise PanicException("Onig: Regex search error: retry-limit-in-match over")
    with pytest.raises(TokenizerError, match="tokenizer t cannot be used: other"), _panics_of("t"):
        raise PanicException("other")


@pytest.mark.slow
def test_ten_million_blanks_are_said():
    with pytest.raises(TokenizerError, match="cut the text"):
        train_tokenizer(TEXTS, 300, whitespace="lines").encode(" " * 12_000_000 + "x")

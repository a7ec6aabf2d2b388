"""Tokenizers, datasets, packings and recipes that somebody else has made."""

from __future__ import annotations

import base64
import copy
import functools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import import_tokenizer, inspect, pack_report, tokenize, verify
from tests.hostile.commands import Main, answer, make_dataset, may_refuse, require_refusal, tiny_tokenizer
from tests.hostile.content import NOT_CONFIGURATIONS, NOT_FILES, NOT_JSON_OBJECTS, Content, as_json, put
from tests.slow import examples
from w1train import plan, pretrain
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing, packing_path
from w1train.data.tokenizer import Tokenizer, TokenizerError, parse_tokenizer_json
from w1train.data.tokenizer_growth import largest_growth


@functools.cache
def _serialized() -> bytes:
    return tiny_tokenizer().serialized


def changed(**sections: Any) -> bytes:
    """A tokenizer.json of which some of the top's parts are others."""
    return as_json({**json.loads(_serialized()), **sections})


def with_model(**values: Any) -> bytes:
    content = json.loads(_serialized())
    content["model"].update(values)
    return as_json(content)


def nested(depth: int) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "Digits", "individual_digits": True}
    for _ in range(depth):
        part = {"type": "Sequence", "pretokenizers": [part]}
    return part


def vocabulary(**more: Any) -> dict[str, Any]:
    return {**json.loads(_serialized())["model"]["vocab"], **more}


def added(**values: Any) -> list[dict[str, Any]]:
    tokens = json.loads(_serialized())["added_tokens"]
    return [*tokens, {**tokens[0], "content": "<more>", "id": 400, **values}]


def character_map(replacements: bytes, size: int = 16) -> dict[str, str]:
    """SentencePiece's table, with a trie of zeros."""
    table = struct.pack("<I", size) + bytes(min(size, 16)) + replacements
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


NOT_TOKENIZERS: dict[str, Content] = {
    **NOT_JSON_OBJECTS,
    "no model": b"{}",
    "a model that is a list": as_json({"model": []}),
    "a vocabulary that is text": with_model(vocab="a"),
    "a vocabulary that is null": with_model(vocab=None),
    "an unknown model": with_model(type="Oracle"),
    "an id of 32 bits": with_model(vocab=vocabulary(zz=2**32 - 1)),
    "an id of 64 bits": with_model(vocab=vocabulary(zz=2**63)),
    "a negative id": with_model(vocab=vocabulary(zz=-1)),
    "a fraction as an id": with_model(vocab=vocabulary(zz=1.5)),
    "text as an id": with_model(vocab=vocabulary(zz="7")),
    "a merge of unknown tokens": with_model(merges=[["qq", "rr"]]),
    "merges that are numbers": with_model(merges=[1, 2]),
    "an added token of 32 bits": changed(added_tokens=added(id=2**32 - 1)),
    "an added token without id": changed(added_tokens=added(id=None)),
    "an added token that is a number": changed(added_tokens=[1]),
    "added tokens that are text": changed(added_tokens="a"),
    "no special tokens": changed(added_tokens=[], model={**json.loads(_serialized())["model"], "vocab": {"a": 0}, "merges": []}),
    "a prefix longer than its tokens": with_model(continuing_subword_prefix="#" * 1000),
    "a word model without unknown": changed(model={"type": "WordLevel", "unk_token": "none", "vocab": vocabulary()}),
    "a list of pieces without unknown": changed(model={"type": "Unigram", "unk_id": 10**9, "vocab": [["a", 0.0]]}),
    "steps in steps": changed(pre_tokenizer=nested(100)),
    "a pattern that is none": changed(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    "a map that is none": changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "pieces of no length": changed(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "replacements that multiply": changed(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100} for _ in range(10)],
        }
    ),
    "a long prefix that is replaced": changed(
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "x" * 5000},
                {"type": "Replace", "pattern": {"String": "x"}, "content": "y" * 5000},
            ],
        }
    ),
    "bytes of bytes": changed(normalizer={"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 10}),
    "a text in many copies": changed(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 10_001,
            "pair": [],
            "special_tokens": {},
        }
    ),
    "a step without its type": changed(normalizer={"pattern": {"Regex": "."}, "content": "x" * 20_000}),
    "a step of unknown type": changed(pre_tokenizer={"type": "Oracle"}),
    "a decoder of unknown type": changed(decoder={"type": "Oracle"}),
    "a map of a large trie": changed(normalizer=character_map(b"", size=0xFFFFFFF0)),
    "a map that is large": changed(normalizer=character_map(b"ab\0" * 180_000)),
    "a map to a long text": changed(normalizer=character_map(b"ab\0" + b"c" * 65 + b"\0")),
}


@pytest.mark.parametrize("content", NOT_TOKENIZERS)
def test_a_tokenizer(tmp_path, content, capsys):
    path, prefix = tmp_path / "tokenizer.json", make_dataset(tmp_path / "data")
    put(path, NOT_TOKENIZERS[content])
    require_refusal(inspect.main, [str(prefix), "--tokenizer", str(path)], capsys, 1, str(path))
    if content in ("directory", "no special tokens", "a text in many copies"):
        # A directory is looked into for its tokenizer.json, special tokens are what an import adds, and templates what it leaves out.
        return
    arguments = ["--input", str(path), "--output", str(tmp_path / "out.json"), "--eos", "<eos>", "--mask", "<mask>", "--pad", "<pad>"]
    require_refusal(import_tokenizer.main, arguments, capsys, 1, str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Prepend", "prepend": "\u2581"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Nmt"}, {"type": "NFKC"}, {"type": "Lowercase"}]}},
        {"pre_tokenizer": None, "decoder": None},
    ],
)
def test_steps_of_published_tokenizers(changes):
    assert Tokenizer(changed(**changes), "t.json").encode("Some text")


def test_a_small_map_of_characters_is_read():
    assert largest_growth({"normalizer": character_map("ab\0\u00fc\u00fc\u00fc\0".encode(), size=8)}) == (3, 1)


def test_a_key_that_is_there_twice_has_the_value_that_was_checked():
    """The library would take the first type for an error, and then the step for one without type."""
    twice = b'{"type": "Replace", "type": "Strip", "strip_left": true, "strip_right": true, "pattern": {"Regex": "."}, "content": "xxx"}'
    tokenizer = Tokenizer(changed(normalizer="HERE").replace(b'"HERE"', twice), "t.json")
    assert tokenizer.decode(tokenizer.encode(" ab ")) == "ab"


def test_a_text_that_would_grow_too_large_is_refused(monkeypatch):
    monkeypatch.setattr("w1train.data.tokenizer.LARGEST_GROWN", 2000)
    replaced = {"type": "Replace", "pattern": {"Regex": "a"}, "content": "x" * 9}
    # With five of the byte-level step, fifty characters of one.
    tokenizer = Tokenizer(
        changed(normalizer=replaced, pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}), "t.json"
    )
    tokenizer.encode_batch(20 * ["a"] + [40 * "a"])
    for call in (lambda: tokenizer.encode(41 * "a"), lambda: tokenizer.encode_batch(["a", 41 * "a"])):
        with pytest.raises(TokenizerError, match="a text of 41 characters is too long"):
            call()


def test_tokens_that_the_decoder_would_make_too_long_are_refused(monkeypatch):
    monkeypatch.setattr("w1train.data.tokenizer.LARGEST_DECODED", 1000)
    replaced = {"type": "Replace", "pattern": {"Regex": "."}, "content": "y" * 9}
    tokenizer = Tokenizer(changed(decoder={"type": "Sequence", "decoders": [replaced, {"type": "Fuse"}]}), "t.json")
    ids = tokenizer.encode(100 * "a")
    tokenizer.decode(ids[:10])
    with pytest.raises(TokenizerError, match=r"the decoder of tokenizer .* may make 10 characters of each"):
        tokenizer.decode(101 * ids[:1])


def test_a_token_of_a_book_is_refused():
    content = json.loads(changed())
    content["model"]["vocab"]["x" * 70_000] = len(content["model"]["vocab"])
    with pytest.raises(TokenizerError, match="has 70000 characters"):
        Tokenizer(json.dumps(content).encode(), "t.json")


def test_a_tokenizer_is_refused_before_a_text_is_read(tmp_path, capsys):
    path = tmp_path / "tokenizer.json"
    put(path, NOT_TOKENIZERS["pieces of no length"])
    (tmp_path / "a.txt").write_text("text")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(path), "--output", str(tmp_path / "data")]
    require_refusal(tokenize.main, arguments, capsys, 1, str(path))


def test_a_panic_while_encoding_is_an_error_of_the_file():
    """The text that is tried at the start does not find every fault."""
    replaced = {"type": "Replace", "pattern": {"String": "qq"}, "content": ""}
    tokenizer = Tokenizer(changed(normalizer=replaced), "t.json")

    class Panicking:
        def __getattr__(self, name):
            def fail(*_, **__):
                raise type("PanicException", (BaseException,), {})("index out of bounds")

            return fail

    tokenizer._backend = Panicking()
    for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.encode_batch(["a"]), lambda: tokenizer.decode([1])):
        with pytest.raises(TokenizerError, match=r"t\.json cannot be used: index out of bounds"):
            call()


HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"


def index(lengths: list[int], pointers: list[int], documents: list[int]) -> bytes:
    header = HEADER.pack(MAGIC, 1, 8, len(lengths), len(documents))
    return header + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents)


NOT_INDEXES: dict[str, Content] = {
    **NOT_FILES,
    "empty": b"",
    "cut header": MAGIC,
    "another magic": HEADER.pack(b"\x7fELF\0\0\0\0\0", 1, 8, 3, 4),
    "another version": HEADER.pack(MAGIC, 7, 8, 3, 4),
    "floats": HEADER.pack(MAGIC, 1, 6, 3, 4),
    "2^64 sequences": HEADER.pack(MAGIC, 1, 8, 2**64 - 1, 4),
    "2^64 documents": HEADER.pack(MAGIC, 1, 8, 3, 2**64 - 1),
    "sizes that overflow to the file's": HEADER.pack(MAGIC, 1, 8, 2**62, 2**61),
    "no documents": HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8),
    "no tokens": index([0, 0], [0, 0], [0, 1, 2]),
    "a negative length": index([3, -1, 7], [0, 6, 4], [0, 1, 2, 3]),
    "a negative pointer": index([3, 2, 4], [-2, 4, 8], [0, 1, 2, 3]),
    "pointers outside": index([3, 2, 4], [0, 6, 2**60], [0, 1, 2, 3]),
    "lengths outside": index([3, 2, 2**31 - 1], [0, 6, 10], [0, 1, 2, 3]),
    "documents outside": index([3, 2, 4], [0, 6, 10], [0, 1, 2, 2**60]),
    "negative documents": index([3, 2, 4], [0, 6, 10], [0, -5, 2, 3]),
    "documents backwards": index([3, 2, 4], [0, 6, 10], [0, 2, 1, 3]),
    "truncated": index([3, 2, 4], [0, 6, 10], [0, 1, 2, 3])[:-1],
}
DATA_COMMANDS: dict[str, tuple[Main, list[str]]] = {
    "inspect": (inspect.main, []),
    "verify": (verify.main, []),
    "pack_report": (pack_report.main, ["--sequence-length", "8"]),
}


@pytest.fixture(params=[True, False], ids=["with manifest", "foreign"])
def prefix(request, tmp_path):
    made = make_dataset(tmp_path / "data")
    if not request.param:
        made.with_suffix(".json").unlink()
    return made


@pytest.mark.parametrize("content", NOT_INDEXES)
def test_an_index(prefix, content, capsys):
    put(prefix.with_suffix(".idx"), NOT_INDEXES[content])
    for main, options in DATA_COMMANDS.values():
        require_refusal(main, [str(prefix), *options], capsys, 1, str(prefix))


NOT_A_BYTE_FOR_EACH_TOKEN: dict[str, Content] = {**NOT_FILES, "empty": b"", "short": bytes(8), "long": bytes(10)}


@pytest.mark.parametrize("content", NOT_A_BYTE_FOR_EACH_TOKEN)
def test_a_file_of_tokens_that_may_be_noised(prefix, content, capsys):
    put(prefix.with_suffix(".may_be_noised"), NOT_A_BYTE_FOR_EACH_TOKEN[content])
    for main, options in DATA_COMMANDS.values():
        require_refusal(main, [str(prefix), *options], capsys, 1, str(prefix))


@pytest.mark.parametrize("content", NOT_JSON_OBJECTS)
def test_a_manifest(tmp_path, content, capsys):
    prefix = make_dataset(tmp_path / "data")
    put(prefix.with_suffix(".json"), NOT_JSON_OBJECTS[content])
    for main, options in DATA_COMMANDS.values():
        require_refusal(main, [str(prefix), *options], capsys, 1, str(prefix.with_suffix(".json")))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bytes": 0},
        {"num_bytes": -1},
        {"num_tokens": 10**30},
        {"num_documents": "3"},
        {"unigram_bits_per_byte": float("nan")},
        {"unigram_bits_per_byte": float("inf")},
        {"created_by": "\x1b[2J"},
        {"created_by": "x" * 100_000},
        {"corpus": []},
        {"corpus": {"num_bad": "many"}},
        {"corpus": {"num_bad": [1]}},
        {"versions": 1},
        {"dtype": ["uint16"]},
        {"bin_num_bytes": 2**62},
        {"format_version": [1]},
    ],
)
def test_a_manifest_of_other_values(tmp_path, changes, capsys):
    path = make_dataset(tmp_path / "data").with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for main, options in DATA_COMMANDS.values():
        require_refusal(main, [str(tmp_path / "data"), *options], capsys, 1, path.name)


def _patched(content: bytes, place: int, *numbers: int) -> bytes:
    return content[:place] + struct.pack(f"<{len(numbers)}q", *numbers) + content[place + 8 * len(numbers) :]


@pytest.mark.parametrize(
    "counts",
    [(-1, 3, 4), (0, 3, 4), (2**62, 3, 4), (2, -3, 4), (2, 2**62, 4), (2, 3, 0), (2, 3, -4), (2, 3, 2**40), (3, 1, 4), (-(2**63), 3, 4)],
)
def test_the_counts_of_a_packing(tmp_path, counts, capsys):
    options = PackingOptions(sequence_length=8)
    dataset = TokenDataset.open(make_dataset(tmp_path / "data"))
    path = ensure_packing(dataset, options)
    path.write_bytes(_patched(path.read_bytes(), 4096 - 24, *counts))
    require_refusal(verify.main, [str(path)], capsys, 1, str(path))
    with pytest.raises(DatasetError, match="is damaged"):
        BestFitDataset(dataset, options, seed=0)


@pytest.mark.parametrize("header", [b"[" * 4000, b"{", b"\xff" * 4000, b"[1]", b'{"format_version": ' + b"9" * 3000 + b"}"])
def test_the_header_of_a_packing(tmp_path, header, capsys):
    dataset = TokenDataset.open(make_dataset(tmp_path / "data"))
    path = packing_path(dataset, PackingOptions(sequence_length=8))
    path.write_bytes(header.ljust(4096))
    require_refusal(verify.main, [str(path)], capsys, 1, str(path))


RECIPES = {name: content for name, content in NOT_CONFIGURATIONS.items() if name not in ("pipe", "directory", "empty")}


@pytest.mark.parametrize("content", RECIPES)
def test_a_recipe(tmp_path, content, capsys):
    path = tmp_path / "recipe/mine.yaml"
    put(path, b"")
    text = RECIPES[content]
    put(path, b"# @package _global_\n" + text if isinstance(text, bytes) else text)
    for main in (pretrain.main, plan.main) if content in ("billion laughs", "terabyte") else [plan.main]:
        require_refusal(main, ["--config-dir", str(tmp_path), "recipe=mine", *(["gpus=1"] if main is plan.main else [])], capsys, 2)
    found, said = answer(pretrain.main, ["--config-dir", str(tmp_path), "--list"], capsys)
    assert (found, "Traceback" in said) == (0, False)
    assert not Path("executed").exists()


# --- fuzz ---


def mutated(content: bytes, draw: Any) -> bytes:
    """Bytes flipped, cut, doubled."""
    changed_bytes = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(changed_bytes) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "cut":
            del changed_bytes[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            changed_bytes[place:place] = draw(st.binary(min_size=1, max_size=4))
        elif changed_bytes:
            changed_bytes[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(changed_bytes)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def swapped(value: Any, draw: Any) -> Any:
    """A JSON value of which one part, at any depth, is another."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        name = draw(st.sampled_from(sorted(value)))
        return {**value, name: swapped(value[name], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], swapped(value[place], draw), *value[place + 1 :]]
    return draw(VALUES)


@settings(max_examples=examples(30), deadline=None)
@given(data=st.data())
def test_any_damage_of_a_dataset_is_its_error(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("fuzz")
    prefix = make_dataset(directory / "data")
    suffix = data.draw(st.sampled_from([".idx", ".json", ".bin", ".may_be_noised"]))
    path = prefix.with_suffix(suffix)
    if suffix == ".may_be_noised":
        prefix.with_suffix(".json").unlink()
        path.write_bytes(b"\0\1\1" * 3)
    if suffix == ".json" and data.draw(st.booleans()):
        path.write_text(json.dumps(swapped(json.loads(path.read_text()), data.draw)))
    else:
        path.write_bytes(mutated(path.read_bytes(), data.draw))
    if suffix == ".idx" and data.draw(st.booleans()):
        prefix.with_suffix(".json").unlink()
    with may_refuse(DatasetError, str(directory)):
        dataset = TokenDataset.open(prefix)
        inspect.count(dataset, np.diff(dataset.document_offsets))
        inspect.check_tokens(dataset, None)
        dataset.read_may_be_noised(0, dataset.num_tokens)


@settings(max_examples=examples(30), deadline=None)
@given(data=st.data())
def test_any_damage_of_a_packing_is_its_error(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("fuzz")
    options = PackingOptions(sequence_length=4)
    dataset = TokenDataset.open(make_dataset(directory / "data"))
    path = ensure_packing(dataset, options)
    content = path.read_bytes()
    place = data.draw(st.integers(4096 - 24, len(content) - 8))
    path.write_bytes(_patched(content, place, data.draw(st.integers(-(2**63), 2**63 - 1))))
    with may_refuse(DatasetError, str(directory)):
        samples = BestFitDataset(dataset, options, seed=0)
        for sample in range(min(samples.index.num_samples, 10)):
            samples._pieces(0, sample)


@settings(max_examples=examples(30), deadline=None)
@given(data=st.data())
def test_any_damage_of_a_tokenizer_is_its_error(data):
    content = json.loads(_serialized())
    serialized = as_json(swapped(copy.deepcopy(content), data.draw)) if data.draw(st.booleans()) else mutated(_serialized(), data.draw)
    with may_refuse(TokenizerError, "t.json"):
        tokenizer = Tokenizer(serialized, "t.json")
        tokenizer.decode(tokenizer.encode("any text, 12 words"))
        tokenizer.num_bytes_by_token()
    with may_refuse(TokenizerError, "t.json"):
        parsed = parse_tokenizer_json(serialized, "t.json")
        if isinstance(parsed["model"]["vocab"], dict):
            import_tokenizer.with_special_tokens(parsed, {"<eos>": "<eos>"}, None, "t.json")

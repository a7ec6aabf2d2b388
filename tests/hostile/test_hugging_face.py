"""Directories of Hugging Face: nothing in them is executed, nothing outside of them is opened, and lies are refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import import_tokenizer
from tests.hostile.commands import answer, may_refuse, require_refusal, tiny_tokenizer
from tests.hostile.content import NOT_FILES, NOT_JSON_OBJECTS, Content, as_json, put
from tests.hostile.test_data_files import mutated, swapped
from tests.slow import examples
from w1train import convert
from w1train.config.errors import UserError
from w1train.conversion.exported_tokenizer import write_tokenizer
from w1train.conversion.families import model_from_config, read_config
from w1train.conversion.sources import LARGEST_HEADER, SafetensorsDirectory

pytest.importorskip("safetensors")

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
INTERNAL = {"a": TENSOR}


def shard(header: object, data: bytes = bytes(8), size: int | None = None) -> bytes:
    """A safetensors file; ``size``: the length of the header that it claims."""
    text = header if isinstance(header, bytes) else as_json(header)
    return struct.pack("<Q", len(text) if size is None else size) + text + data


@pytest.fixture
def directory(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_bytes(as_json(CONFIG))
    (made / SHARD).write_bytes(shard(INTERNAL))
    (made / INDEX).write_bytes(as_json({"metadata": {}, "weight_map": {"a": SHARD}}))
    tiny_tokenizer().save(made / "tokenizer.json")
    return made


class Evil:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_of_a_directory_is_executed(directory, tmp_path, capsys):
    executed = tmp_path / "executed"
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (directory / "evil.py").write_text(f"from pathlib import Path\nPath({str(executed)!r}).touch()\n")
    (directory / "config.json").write_bytes(as_json({**CONFIG, "auto_map": auto_map}))
    (directory / "tokenizer_config.json").write_bytes(as_json({"tokenizer_class": "Tokenizer", "auto_map": auto_map}))
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (directory / name).write_bytes(pickle.dumps(Evil(executed)))
    assert answer(convert.main, ["from-hf", str(directory)], capsys)[0] == 0
    assert SafetensorsDirectory(directory).tensors == {"a": (2,)}
    arguments = ["--input", str(directory), "--output", str(tmp_path / "t.json"), "--eos", "<eos>", "--mask", "<mask>", "--pad", "<pad>"]
    assert answer(import_tokenizer.main, arguments, capsys)[0] == 0
    # The weights in a pickle alone, by a glob and by the index.
    (directory / INDEX).write_bytes(as_json({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(UserError, match=r"'pytorch_model\.bin' is not the plain name of a \.safetensors file"):
        SafetensorsDirectory(directory)
    (directory / INDEX).unlink()
    (directory / SHARD).unlink()
    with pytest.raises(UserError, match=r"has no .*safetensors; it has pytorch_model\.bin"):
        SafetensorsDirectory(directory)
    assert not executed.exists()
    assert "evil" not in sys.modules


def test_an_export_names_no_code_of_others(directory, tmp_path):
    settings_file = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["somebody/evil--evil.Tokenizer", None]}}
    (directory / "tokenizer_config.json").write_bytes(as_json(settings_file))
    write_tokenizer(directory / "tokenizer.json", directory / "tokenizer.json", tmp_path, 1 << 20)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in settings


def test_an_export_has_no_files_from_elsewhere(directory, tmp_path, caplog):
    """The tokenizer's directory is what somebody's config.yaml says, and the export is for all to see."""
    (tmp_path / "secret").write_text('{"key": "secret"}')
    (directory / "chat_template.jinja").symlink_to(tmp_path / "secret")
    (directory / "tokenizer_config.json").symlink_to("../secret")
    os.mkfifo(directory / "generation_config.json")
    with (directory / "special_tokens_map.json").open("wb") as file:
        file.truncate((16 << 20) + 1)
    exported = tmp_path / "exported"
    exported.mkdir()
    write_tokenizer(directory / "tokenizer.json", directory / "tokenizer.json", exported, 1 << 20)
    assert sorted(path.name for path in exported.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert "secret" not in (exported / "tokenizer_config.json").read_text()
    assert caplog.text.count("is left out of the export") == 4


@pytest.mark.parametrize("outside", [False, True])
def test_an_export_follows_the_links_of_the_hub_cache(directory, tmp_path, outside):
    blobs, snapshot, exported = tmp_path / "blobs", tmp_path / "snapshots/1234", tmp_path / "exported"
    for made in (blobs, snapshot, exported):
        made.mkdir(parents=True)
    if outside:
        blobs.rename(tmp_path / "secrets")
        blobs.symlink_to(tmp_path / "secrets")
    (blobs / "abcd").write_text("{{ messages }}")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/abcd")
    write_tokenizer(directory / "tokenizer.json", snapshot / "tokenizer.json", exported, 1 << 20)
    assert (exported / "chat_template.jinja").exists() == (not outside)
    assert outside or (exported / "chat_template.jinja").read_text() == "{{ messages }}"


def test_no_module_imports_transformers():
    """Its classes run the code of a directory on request, and look at more files than we check."""
    root = Path(convert.__file__).parents[1]
    for path in [*(root / "w1train").rglob("*.py"), *(root / "data_tools").rglob("*.py")]:
        if "remote_code" in path.parts:
            continue  # copied into exports, and never imported here
        assert not re.search(r"^\s*(from|import)\s+transformers\b", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/hostname", "{outside}/secret.safetensors", "..", "", "sub/a.safetensors", "a\0b"]
)
def test_a_name_never_leaves_its_directory(directory, tmp_path, name):
    (tmp_path / "secret.safetensors").write_bytes(shard(INTERNAL))
    (directory / "sub").mkdir()
    (directory / "sub/a.safetensors").write_bytes(shard(INTERNAL))
    (directory / INDEX).write_bytes(as_json({"weight_map": {"a": name.format(outside=tmp_path)}}))
    with pytest.raises(UserError, match=r"is not the plain name of a \.safetensors file"):
        SafetensorsDirectory(directory)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_link_never_leaves_its_directory(directory, tmp_path, indexed):
    (tmp_path / "secret.safetensors").write_bytes(shard(INTERNAL))
    (directory / SHARD).unlink()
    (directory / SHARD).symlink_to(tmp_path / "secret.safetensors")
    if not indexed:
        (directory / INDEX).unlink()
    with pytest.raises(UserError, match=r"is a link to .*secret\.safetensors, outside of its directory"):
        SafetensorsDirectory(directory)


def test_the_links_of_the_hub_s_cache_are_followed(directory, tmp_path):
    model = tmp_path / "models--somebody--model"
    snapshot = model / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        shutil.copyfile(path, model / f"blobs/{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert SafetensorsDirectory(snapshot).tensors == {"a": (2,)}
    (snapshot / SHARD).unlink()
    (tmp_path / "secret").write_bytes(shard(INTERNAL))
    (snapshot / SHARD).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="is a link to"):
        SafetensorsDirectory(snapshot)


NOT_SHARDS: dict[str, Content] = {
    **NOT_FILES,
    "empty": b"",
    "longer than the file": shard(INTERNAL, size=1000),
    "2^64 bytes": shard(INTERNAL, size=2**64 - 1),
    "nested": shard(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a list": shard([1]),
    "not UTF-8": shard(b'{"\xff": 1}'),
    "offsets outside": shard({"a": {**TENSOR, "shape": [200], "data_offsets": [0, 800]}}),
    "offsets that overlap": shard({"a": TENSOR, "b": TENSOR}),
    "offsets backwards": shard({"a": {**TENSOR, "data_offsets": [8, 0]}}),
    "negative offsets": shard({"a": {**TENSOR, "data_offsets": [-8, 0]}}),
    "a hole": shard({"a": {**TENSOR, "data_offsets": [8, 16]}}, bytes(16)),
    "a negative shape": shard({"a": {**TENSOR, "shape": [-2]}}),
    "a shape that overflows": shard({"a": {**TENSOR, "shape": [2**40, 2**40]}}),
    "an unknown dtype": shard({"a": {**TENSOR, "dtype": "X9"}}),
    "a dtype that is no weight's": shard({"a": {**TENSOR, "dtype": "I64", "shape": [1]}}),
}


@pytest.mark.parametrize("content", NOT_SHARDS)
def test_a_shard(directory, content):
    put(directory / SHARD, NOT_SHARDS[content])
    with pytest.raises(UserError, match=SHARD):
        SafetensorsDirectory(directory)


def test_a_large_header_is_refused_before_it_is_parsed(directory):
    text = b"{" + b" " * LARGEST_HEADER + as_json(INTERNAL)[1:]
    put(directory / SHARD, shard(text))
    with pytest.raises(UserError, match=rf"{SHARD} is damaged: it says that its header has {len(text)} bytes"):
        SafetensorsDirectory(directory)


@pytest.mark.parametrize(
    "content", {**NOT_JSON_OBJECTS, **{f"weight_map {value}": b"" for value in ("[]", "null", "7", '{"a": 7}', '{"a": null}', "{}")}}
)
def test_an_index_of_shards(directory, content):
    put(directory / INDEX, NOT_JSON_OBJECTS.get(content) or f'{{"weight_map": {content.removeprefix("weight_map ")}}}'.encode())
    if content in NOT_FILES and content != "terabyte":
        return  # not a file: the directory is taken as one without an index
    with pytest.raises(UserError, match=INDEX):
        SafetensorsDirectory(directory)


SIZES = ("vocab_size", "hidden_size", "num_attention_heads")
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range")
CHANGES: dict[str, dict[str, Any]] = {
    **{f"{key} {value!r}": {key: value} for key in SIZES for value in (None, "7", 7.5, [7], True)},
    **{f"{key} {value!r}": {key: value} for key in NUMBERS for value in ("7", [7], True)},
    "infinite": {"rope_theta": float("inf")},
    "no number": {"rms_norm_eps": float("nan")},
    "a million layers": {"num_hidden_layers": 1_000_000},
    "a vocabulary of 10^12": {"vocab_size": 10**12},
    "a negative size": {"intermediate_size": -1},
    "no heads": {"num_attention_heads": 0},
    "no channels": {"head_dim": 0},
    "text as heads": {"num_key_value_heads": "2"},
    "text as positions": {"max_position_embeddings": "128"},
    "text as a flag": {"tie_word_embeddings": "yes"},
    "rope_scaling that is a list": {"rope_scaling": [1]},
    "rope_parameters that are text": {"rope_parameters": "linear"},
    "rope_type that is a list": {"rope_scaling": {"rope_type": []}},
    "a factor that is text": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": "8",
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "layer_types of lists": {"layer_types": [["full_attention"]]},
    "layer_types that is a number": {"layer_types": 7},
    "architectures that is a number": {"architectures": 7},
    "architectures of lists": {"architectures": [[1]]},
    "a model_type that is a list": {"model_type": ["llama"]},
    "an activation of a megabyte": {"hidden_act": "x" * (1 << 20)},
    "conditioning that is unknown": {"model_type": "w1", "architectures": [], "conditioning": ["adaln"]},
    "conditioning without sizes": {"model_type": "w1", "architectures": [], "conditioning": "adaln"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_configuration_of_other_values(directory, change, capsys):
    (directory / "config.json").write_bytes(as_json({**CONFIG, **CHANGES[change]}))
    require_refusal(convert.main, ["from-hf", str(directory)], capsys, 2, str(directory))


@pytest.mark.parametrize("content", NOT_JSON_OBJECTS)
def test_a_configuration(directory, content, capsys):
    put(directory / "config.json", NOT_JSON_OBJECTS[content])
    require_refusal(convert.main, ["from-hf", str(directory)], capsys, 2, str(directory))


@settings(max_examples=examples(50), deadline=None)
@given(data=st.data())
def test_any_change_of_a_configuration_is_its_error(data):
    name = data.draw(st.sampled_from(sorted(CONFIG)))
    with may_refuse(UserError, "origin"):
        model = model_from_config({**CONFIG, name: swapped(CONFIG[name], data.draw)}, "origin")
        assert 0 < model.num_layers <= 4096


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_any_damage_of_a_directory_is_its_error(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("fuzz")
    files = {
        "config.json": as_json(CONFIG),
        SHARD: shard({"a": TENSOR, "b": {**TENSOR, "data_offsets": [8, 16]}}, bytes(16)),
        INDEX: as_json({"metadata": {}, "weight_map": {"a": SHARD, "b": SHARD}}),
    }
    damaged = data.draw(st.sampled_from(sorted(files)))
    for name, content in files.items():
        (directory / name).write_bytes(mutated(content, data.draw) if name == damaged else content)
    with may_refuse(UserError, str(directory)):
        model_from_config(read_config(directory), str(directory))
        source = SafetensorsDirectory(directory)
        for name, shape in source.tensors.items():
            source.read(name, tuple(slice(0, extent) for extent in shape))

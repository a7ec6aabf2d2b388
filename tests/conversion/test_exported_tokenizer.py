"""The tokenizer of an export: its settings name only tokens that exist, and companion files agree with tokenizer.json."""

import json

import pytest

from data_tools import import_tokenizer
from tests.conversion.tiny_models import transformers
from tests.distributed import run_distributed
from tests.tiny import tiny_config
from w1train.conversion.exported_tokenizer import write_tokenizer
from w1train.conversion.families import config_of
from w1train.data.tokenizer import Tokenizer, train_tokenizer

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A tokenizer without <bos> and with a hole before its special tokens, as data_tools.import_tokenizer makes it; its ids end at 301."""
    directory = tmp_path_factory.mktemp("imported")
    content = json.loads(
        run_distributed(lambda _rank, _size: train_tokenizer(["some text"] * 9, 280).serialized, 1, process_group=False)[0]
    )
    named = {"<pad>": "<|one|>", "<eos>": "<|end|>", "<bos>": "<|two|>", "<mask>": "<|three|>"}
    content["added_tokens"] = [{"id": 290, "content": "<|end|>", **FLAGS}, {"id": 299, "content": "<|user|>", **FLAGS}]
    content["model"]["vocab"] = {named.get(text, text): number for text, number in content["model"]["vocab"].items() if text != "<eos>"}
    (directory / "source.json").write_text(json.dumps(content))
    arguments = ["--input", str(directory / "source.json"), "--output", str(directory / "tokenizer.json"), "--eos", "<|end|>"]
    assert run_distributed(lambda _rank, _size: import_tokenizer.main(arguments), 1, process_group=False) == [0]
    return directory / "tokenizer.json"


@pytest.fixture
def tokenizer(imported, tmp_path):
    """The tokenizer in a directory of its own, for companions, and a directory for the export."""
    (tmp_path / "output").mkdir()
    (tmp_path / "tokenizer.json").write_bytes(imported.read_bytes())
    return tmp_path / "tokenizer.json"


def write(path, vocab_size=302):
    return write_tokenizer(path, path, path.parent / "output", vocab_size)


def in_transformers(directory):
    """Return the ids of transformers' tokenizer, and those of its special tokens."""

    def inside(_rank, _size):
        found = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        return found.get_vocab(), found.eos_token_id, found.pad_token_id, found.mask_token_id, found.bos_token_id

    return run_distributed(inside, 1, process_group=False)[0]


def test_transformers_adds_no_token(tokenizer):
    assert write(tokenizer) == {"eos_token_id": 290, "bos_token_id": None, "pad_token_id": 301}
    assert in_transformers(tokenizer.parent / "output") == (Tokenizer.load(tokenizer).ids_by_token(), 290, 301, 300, None)


def test_the_class_of_a_family_adds_no_token(tokenizer):
    """Qwen2Tokenizer would add <|endoftext|>."""
    (tokenizer.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    write(tokenizer)
    output = tokenizer.parent / "output"
    (output / "config.json").write_text('{"model_type": "qwen2"}')
    (found,) = run_distributed(lambda _rank, _size: transformers.AutoTokenizer.from_pretrained(output).get_vocab(), 1, process_group=False)
    assert found == Tokenizer.load(tokenizer).ids_by_token()


def test_ids_of_config_json(tokenizer, tmp_path):
    """The stock classes put ids of their own in the place of a key that is not there: bos_token_id 1 in Llama, which is <eos> here."""

    def inside(_rank, _size):
        train_tokenizer(["some text"] * 9, 280).save(tmp_path / "own.json")
        special = [
            write_tokenizer(path, path, tmp_path / "output", 302) for path in (tmp_path / "own.json", tokenizer, tmp_path / "absent")
        ]
        configs = [transformers.LlamaConfig(**config_of(tiny_config().model, "llama", "float32", ids)) for ids in special]
        configs += [transformers.GenerationConfig.from_model_config(config) for config in configs]
        return [(config.eos_token_id, config.bos_token_id, config.pad_token_id) for config in configs]

    assert run_distributed(inside, 1, process_group=False) == [[(1, 2, 0), (290, None, 301), (None, None, None)] * 2]


def test_tokens_without_a_row_are_not_named(tokenizer, caplog):
    assert write(tokenizer, vocab_size=301) == {"eos_token_id": 290, "bos_token_id": None, "pad_token_id": None}
    settings = json.loads((tokenizer.parent / "output/tokenizer_config.json").read_text())
    assert [key for key, value in settings.items() if key.endswith("_token") and value] == ["eos_token", "mask_token"]
    assert "1 tokens of the tokenizer have no row in the model of 301 rows (the first is '<pad>' with the id 301)" in caplog.text


OWN_TOKENS = {"eos_token": "<eos>", "pad_token": "<pad>", "mask_token": "<mask>", "unk_token": None}
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
RIGHT = {
    "tokenizer_config.json": [
        {"eos_token": "<eos>", "pad_token": {"content": "<pad>"}, "unk_token": None, "add_bos_token": True},
        {
            "additional_special_tokens": ["<|user|>"],
            "added_tokens_decoder": {"299": {"content": "<|user|>", **FLAGS}},
            "chat_template": "<|user|>",
        },
        {"extra_special_tokens": {"user_token": "<|user|>"}, "added_tokens_decoder": {"299": "<|user|>"}},
    ],
    "special_tokens_map.json": [{"mask_token": "<mask>", "bos_token": "<|user|>"}],
    "generation_config.json": [{"eos_token_id": [290, 299], "pad_token_id": 301, "bos_token_id": None, "temperature": 0.7}],
}
WRONG = {
    "tokenizer_config.json": [
        ({"eos_token": "<|end|>"}, "eos_token is '<|end|>', which is not a token of the model"),
        ({"eos_token": "<|user|>"}, "eos_token is '<|user|>', and <eos> in tokenizer.json"),
        ({"pad_token": {"content": "<eos>"}}, "pad_token is '<eos>', and <pad> in tokenizer.json"),
        ({"additional_special_tokens": ["<|new|>"]}, "additional_special_tokens is '<|new|>'"),
        ({"extra_special_tokens": {"image_token": "<image>"}}, "image_token is '<image>'"),
        ({"model_specific_special_tokens": {"image_token": "<image>"}}, "image_token is '<image>'"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "<|user|>"}}}, "'<|user|>' has the id '9999"),
        ({"added_tokens_decoder": {"298": {"content": "<|user|>"}}}, "'<|user|>' has the id '298' there, and 299 in tokenizer.json"),
        ({"added_tokens_decoder": {"299": {"content": "<|user|>", "lstrip": True}}}, "'<|user|>' has lstrip: True there"),
        ({"added_tokens_decoder": {"300": {"content": "<mask>", "special": False}}}, "'<mask>' has special: False there"),
        ({"additional_special_tokens": ["a"]}, "additional_special_tokens is 'a', which is a piece of ordinary text"),
        ({"chat_template": [{"name": "default", "template": "<|end|>"}]}, "it writes '<|end|>', which is not a token of the model"),
        ({"chat_template": "{{ '\n[INST] ' + text }}"}, "it writes '[INST]'"),
    ],
    "special_tokens_map.json": [({"bos_token": {"content": "<s>"}}, "bos_token is '<s>'")],
    "generation_config.json": [
        ({"eos_token_id": [299]}, "eos_token_id is [299], and 290 in tokenizer.json"),
        ({"pad_token_id": 290}, "pad_token_id is 290, and 301 in tokenizer.json"),
        ({"bos_token_id": 295}, "the tokenizer has no token 295"),
        ({"eos_token_id": [290, {}]}, "the tokenizer has no token {}"),
    ],
}


@pytest.mark.parametrize(("name", "settings"), [(name, settings) for name, cases in RIGHT.items() for settings in cases], ids=str)
def test_files_that_agree_are_copied(tokenizer, name, settings):
    (tokenizer.parent / name).write_text(json.dumps(settings))
    write(tokenizer)
    expected = {**OWN_TOKENS, **settings, **CLASS} if name == "tokenizer_config.json" else settings
    assert json.loads((tokenizer.parent / "output" / name).read_text()) == expected


@pytest.mark.parametrize(("name", "settings", "reason"), [(name, *case) for name, cases in WRONG.items() for case in cases], ids=str)
def test_files_that_contradict_the_tokenizer_are_left_out(tokenizer, caplog, name, settings, reason):
    (tokenizer.parent / name).write_text(json.dumps(settings))
    write(tokenizer)
    assert f"{name} is left out of the export, because it contradicts tokenizer.json: " in caplog.text
    assert reason in caplog.text
    expected = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tokenizer.parent / "output").iterdir()} == expected
    assert json.loads((tokenizer.parent / "output/tokenizer_config.json").read_text())["eos_token"] == "<eos>"


@pytest.mark.parametrize(("name", "content"), [("special_tokens_map.json", "{"), ("tokenizer_config.json", "[]")])
def test_files_that_are_not_settings_are_left_out(tokenizer, caplog, name, content):
    """The weights are written before them, and are not lost."""
    (tokenizer.parent / name).write_text(content)
    write(tokenizer)
    assert f"{tokenizer.parent / name} is left out of the export: " in caplog.text
    assert {path.name for path in (tokenizer.parent / "output").iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


CODE = """{%- for m in messages %}{% if m['role'] == "user" and messages[N].size<limit and 3 > limit %}{{ m["content"][N] }}{% endif %}"""


@pytest.mark.parametrize(
    ("template", "is_copied"),
    [
        ("<|user|>{{ eos_token }}<eos>", True),
        (CODE, True),
        ("Tools are within <tools></tools> tags, and - [x] or [0] is text.", True),
        ("{{ messages }}<|end|>", False),
        ("<｜User｜>{{ messages }}", False),
        ("<start_of_turn>{{ messages }}", False),
        ("<s>{{ messages }}</s>", False),
        ("{{ '[INST] ' + messages }}", False),
        (r"{{ messages + '\n[/INST]' }}", False),
        ("[gMASK]{{ messages }}", False),
    ],
)
def test_templates(tokenizer, template, is_copied):
    (tokenizer.parent / "chat_template.jinja").write_text(template)
    write(tokenizer)
    assert (tokenizer.parent / "output/chat_template.jinja").exists() == is_copied

"""The tokenizer of an export, with the settings that transformers keeps beside tokenizer.json.

transformers adds a token for each name in the settings that tokenizer.json does not have. Such a token gets an id that the model has no row
for, or the id of another token. The settings therefore name only tokens that exist, and files that name others are left out. Classes of
model families, such as Qwen2Tokenizer, add tokens of their own, so every export names the class that adds no token.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from w1train.config.errors import listing
from w1train.config.reading import LARGEST_JSON, FileContentError, parse_json_object, shorten
from w1train.conversion.sources import find_inside
from w1train.data.tokenizer import BOS_TOKEN, EOS_TOKEN, MASK_TOKEN, PAD_TOKEN, Tokenizer
from w1train.runtime.files import write_bytes, write_text
from w1train.runtime.names import is_plain_name, open_inside

logger = logging.getLogger(__name__)

_SETTINGS = "tokenizer_config.json"
COMPANIONS = (_SETTINGS, "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_ROLES = {"eos_token": EOS_TOKEN, "bos_token": BOS_TOKEN, "pad_token": PAD_TOKEN, "mask_token": MASK_TOKEN}
"""The names of w1train's special tokens, by their names in the settings of transformers."""
_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
"""The class of transformers that has the tokens of tokenizer.json and no other."""
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
"""The properties of an added token, which decide how texts are cut at it, and whether it is decoded."""
_MARKERS = (
    re.compile(r"<\|[^|<>\s]+\|>"),
    re.compile(r"<｜[^｜<>\s]+｜>"),
    re.compile(r"</?\w+>"),
    # Code of a template, such as messages[N], has a name or a bracket before it. The n of a line feed in a text of the code is no name.
    re.compile(r"(?:(?<![\w\])])|(?<=\\[nrt]))\[/?[a-z]?[A-Z][A-Z0-9_]*\]"),
)
"""The usual spellings of special tokens in the templates of chats: <|user|>, <｜User｜>, <start_of_turn> and [INST]."""


def write_tokenizer(copy: Path, original: Path, output: Path, vocab_size: int) -> dict[str, Any]:
    """Write the tokenizer and the settings that transformers keeps with it, and return the ids of its special tokens for config.json.

    An id is None if there is no such token. The stock classes would put ids of their own in the place of a key that is not there.

    Args:
        copy: the run's own copy of the tokenizer, because the original may be on another machine.
        original: the file that the run's configuration names; settings in its directory are copied.
        vocab_size: number of rows of the model. The settings do not name special tokens without a row.
    """
    path = next((path for path in (copy, original) if path.is_file()), None)
    if path is None:
        logger.warning("the run's tokenizer is neither %s nor %s: the export has no tokenizer", copy, original)
        return dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    tokenizer = Tokenizer.load(path)
    tokenizer.save(output / "tokenizer.json")
    ids = _ids_with_rows(tokenizer, vocab_size)
    if not original.parent.is_dir():
        logger.warning("%s does not exist: the export gets default settings of the tokenizer", original.parent)
    added = {token["content"]: token for token in json.loads(tokenizer.serialized).get("added_tokens") or []}
    for name in COMPANIONS:
        copy_companion(original.parent, name, output, ids, added)
    if not (output / _SETTINGS).is_file():
        settings = {**_CLASS, "clean_up_tokenization_spaces": False, **_own_tokens(ids)}
        write_text(output / _SETTINGS, json.dumps(settings, indent=2) + "\n")
    return {f"{role}_id": ids.get(_ROLES[role]) for role in ("eos_token", "bos_token", "pad_token")}


def _ids_with_rows(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Return the ids of the tokens that the model has rows for, and warn of the others."""
    ids = tokenizer.ids_by_token()
    without = sorted((number, token) for token, number in ids.items() if number >= vocab_size)
    if without:
        logger.warning(
            "%d tokens of the tokenizer have no row in the model of %d rows (the first is %s with the id %d), and the export's settings do "
            "not name them",
            *(len(without), vocab_size, shorten(without[0][1]), without[0][0]),
        )
    return {token: number for token, number in ids.items() if number < vocab_size}


def _own_tokens(ids: Mapping[str, int]) -> dict[str, str | None]:
    """Return the special tokens by their names in the settings.

    transformers 5 takes Qwen2Tokenizer for qwen2 whatever the settings say, and this class adds <|endoftext|> as the unknown token if the
    settings do not say that there is no such token.
    """
    return {role: token for role, token in _ROLES.items() if token in ids} | {"unk_token": None}


def copy_companion(directory: Path, name: str, output: Path, ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]]) -> None:
    """Copy a file from the directory of a tokenizer, if the file exists and does not contradict the tokenizer, without its auto_map.

    An auto_map names code, even of other repositories, which transformers would run for users who trust this export's own code.
    The directory's name comes from a config.yaml that somebody else may have written, and exports are published: a file that is too large
    or has the wrong content, or a link to a file in another directory, is left out with a warning.

    Args:
        ids: the id of each token of the exported tokenizer.
        added: the entries of its added tokens, by their contents.
    """
    path = directory / name
    content = _read_companion(directory, name)
    if content is None:
        return
    if path.suffix == ".json":
        try:
            settings = parse_json_object(content, f"{path} is left out of the export")
        except FileContentError as error:
            logger.warning("%s", error)
            return
        contradictions = [*_of_tokens(settings, ids, added), *_of_ids(settings, ids)]
        if settings.pop("auto_map", None) is not None:
            logger.warning("%s: its auto_map, which names code to run, is left out of the export", path)
        if name == _SETTINGS:
            settings = {**_own_tokens(ids), **settings, **_CLASS}
        content = (json.dumps(settings, indent=2) + "\n").encode("utf-8")
    else:
        contradictions = list(_of_template(content.decode("utf-8", errors="replace"), ids))
    if contradictions:
        shown = listing(contradictions[:3])
        logger.warning("%s is left out of the export, because it contradicts tokenizer.json: %s", path, shown)
        return
    write_bytes(output / name, content)


def _of_tokens(settings: dict[str, Any], ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield how tokens that the settings name contradict the tokenizer: they do not exist, are pieces of ordinary text, or have another id,
    another role or other properties. transformers would take the properties from the settings."""
    for key, value in _named_tokens(settings):
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str):
            continue
        if token not in ids:
            yield f"{key} is {shorten(token)}, which is not a token of the model"
        elif key.isdecimal() and str(ids[token]) != key:
            yield f"{shorten(token)} has the id {shorten(key)} there, and {ids[token]} in tokenizer.json"
        elif (own := _ROLES.get(key)) in ids and token != own:
            yield f"{key} is {shorten(token)}, and {own} in tokenizer.json"
        elif token not in added:
            yield f"{key} is {shorten(token)}, which is a piece of ordinary text in tokenizer.json"
        elif key.isdecimal() and isinstance(value, dict):
            different = [flag for flag in _FLAGS if value.get(flag) not in (None, added[token].get(flag, False))]
            yield from (f"{shorten(token)} has {flag}: {shorten(value[flag])} there, and not in tokenizer.json" for flag in different)
    yield from _of_template(json.dumps(settings.get("chat_template"), ensure_ascii=False), ids)


def _named_tokens(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each token of the settings, a text or an object with its content, with its key or its id."""
    for key, value in settings.items():
        if key.endswith(("_token", "special_tokens")) or key == "added_tokens_decoder":
            for name, token in value.items() if isinstance(value, dict) and "content" not in value else [(key, value)]:
                yield from ((name, each) for each in (token if isinstance(token, list) else [token]))


def _of_ids(settings: dict[str, Any], ids: Mapping[str, int]) -> Iterator[str]:
    """Yield how ids such as eos_token_id, which may be a list, contradict the tokenizer."""
    known = set(ids.values())
    for key, value in settings.items():
        numbers = value if isinstance(value, list) else [value]
        if not key.endswith("_token_id") or value is None:
            continue
        own = ids.get(_ROLES.get(key.removesuffix("_id"), ""))
        if own is not None and own not in numbers:
            yield f"{key} is {shorten(value)}, and {own} in tokenizer.json"
        elif unknown := [number for number in numbers if type(number) is not int or number not in known]:
            yield f"{key} is {shorten(value)}, and the tokenizer has no token {shorten(unknown[0])}"


def _of_template(template: str, ids: Mapping[str, int]) -> Iterator[str]:
    """Yield the special tokens that the template of a chat writes and the tokenizer does not have.

    A pair such as <tools> and </tools> is ordinary text with markup, except <s> and </s>, which begin and end a sentence.
    """
    found = {token for marker in _MARKERS for token in marker.findall(template)} - ids.keys()
    for token in sorted(found):
        name = token.strip("</>")
        if name == "s" or not {f"<{name}>", f"</{name}>"} <= found:
            yield f"it writes {shorten(token)}, which is not a token of the model"


def _read_companion(directory: Path, name: str) -> bytes | None:
    """Return the content of a file; None if it does not exist, or cannot be exported, which the log says."""
    path = directory / name
    try:
        with _open_companion(directory, name) as file:
            content = file.read(LARGEST_JSON + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning(
            "%s is left out of the export: it is a link to a file elsewhere, or cannot be read (%s)", path, error.strerror or error
        )
        return None
    if len(content) > LARGEST_JSON:
        logger.warning("%s is left out of the export: it has more than %d bytes", path, LARGEST_JSON)
        return None
    return content


def _open_companion(directory: Path, name: str) -> BufferedReader:
    """Open a regular file of a directory. Links of the cache of huggingface_hub are followed, as for weights (w1train.conversion.sources).

    Raises:
        OSError: the file does not exist, cannot be read, is another link or is not a regular file.
    """
    if (target := find_inside(directory, name)) is not None and is_plain_name(target.name):
        return open_inside(target.parent, target.name)
    return open_inside(directory, name)

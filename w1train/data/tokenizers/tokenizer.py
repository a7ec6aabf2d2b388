"""The byte-level BPE tokenizer: a Hugging Face ``tokenizers`` file behind a small interface, and its training.

Layout of a vocabulary made here: special tokens first (``<pad>`` = 0, ``<eos>`` = 1, ``<bos>`` = 2, reserved ones, ``<mask>`` at
a chosen id), then the 256 bytes, then the merges. A mask whose id is too high for that (LLaDA's 126336 of 126464) is alone at
its id, among the merges. There is no normalisation, so any text comes back as it went in.

Merges stay inside pieces. By default every digit is a piece, and everything else is cut by the GPT-2 pattern: letters and symbols may
carry one leading space, a run of white space is one piece but for its last character. :func:`train_tokenizer` has other rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from w1train.config.errors import UserError
from w1train.config.reading import FileContentError, parse_json, read_bounded, shorten
from w1train.data.tokenizers.tokenizer_growth import largest_growth
from w1train.runtime.files import write_bytes

logger = logging.getLogger(__name__)

PAD_TOKEN, EOS_TOKEN, BOS_TOKEN, MASK_TOKEN = "<pad>", "<eos>", "<bos>", "<mask>"
MIN_NUM_SPECIAL_TOKENS = 16
NUM_BYTES = 256
MAX_VOCAB_SIZE = 2**24
"""Dozens of times the largest vocabularies in use. The library takes memory for all ids before it has a text, and aborts without it."""

LARGEST_TOKENIZER = 64 << 20
"""The most bytes of a tokenizer.json; those of the largest vocabularies in use have half of it."""
LARGEST_GROWN = 1 << 32
"""Characters that the steps of a tokenizer.json might make of one text; the library takes a hundred bytes for each that they do make."""
_PROBE = "Some text, 42 words.\n\tÜ \U0001f600"


class TokenizerError(UserError):
    """A tokenizer file that cannot be used, a vocabulary that cannot be built, or a text that has no tokens."""


class Tokenizer:
    """Text to token ids and back.

    Text is untrusted: ``<eos>`` or ``<mask>`` written in a document is encoded as the characters it is made of, never as the
    special token.
    """

    def __init__(self, serialized: bytes, origin: str) -> None:
        """``serialized`` is the content of a tokenizer.json, ``origin`` its name in error messages."""
        self.serialized: bytes = serialized
        """The file's content."""
        self._origin = origin
        self._backend, self._growth = _parse(serialized, origin)
        self.fingerprint: str = hashlib.sha256(serialized).hexdigest()
        """sha256 of the file: two tokenizers are the same if and only if their files are."""
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        """Number of ids; the model's vocabulary may be larger, never smaller."""
        self.pad_token_id: int = self._special_token_id(PAD_TOKEN)
        self.eos_token_id: int = self._special_token_id(EOS_TOKEN)
        self.mask_token_id: int = self._special_token_id(MASK_TOKEN)
        self._try()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            TokenizerError: if there is no such file, or it is no tokenizer with the special tokens needed here.
        """
        return cls(read_tokenizer_file(Path(path)), origin=str(path))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json, complete or not at all; its fingerprint is this object's."""
        write_bytes(path, self.serialized)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without EOS.

        Raises:
            TokenizerError: it is not Unicode, or too long for what the tokenizer makes of it.
        """
        self._require_room([text])
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            # An argument whose bytes are not UTF-8 comes with these.
            raise TokenizerError(f"{text[:80]!r} is not Unicode: character {error.start} is a lone surrogate") from error
        with _panics_of(self._origin):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, computed on all cores.

        Raises:
            TokenizerError: a text is too long for what the tokenizer makes of it.
        """
        self._require_room(texts)
        with _panics_of(self._origin):
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of the ids; special tokens are shown by name (``<mask>``) or left out, broken UTF-8 as U+FFFD.

        Raises:
            TokenizerError: if an id is outside the vocabulary.
        """
        ids = [int(token_id) for token_id in ids]
        outside = next((token_id for token_id in ids if not 0 <= token_id < self.vocab_size), None)
        if outside is not None:
            # The library would leave such ids out in silence.
            raise TokenizerError(f"token id {outside} is outside the vocabulary of {self._origin} ({self.vocab_size} ids)")
        with _panics_of(self._origin):
            return self._backend.decode(ids, skip_special_tokens=skip_special)

    def num_bytes_by_token(self) -> NDArray[np.int64] | None:
        """UTF-8 bytes that each id stands for, int64 [number of ids]; 0 for special tokens and ids without a token.

        Exact, since every character of a byte-level token is one byte of the text; None if this is no byte-level tokenizer.
        """
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        num_bytes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
        for token, token_id in vocabulary.items():
            if token_id in added:
                num_bytes[token_id] = 0 if added[token_id].special else len(token.encode("utf-8"))
            elif alphabet.issuperset(token):
                num_bytes[token_id] = len(token)
            else:
                return None
        return num_bytes

    def _require_room(self, texts: Sequence[str]) -> None:
        longest = max(map(len, texts), default=0)
        if longest * self._growth > LARGEST_GROWN:
            raise TokenizerError(
                f"a text of {longest} characters is too long: tokenizer {self._origin} may make {self._growth} characters of each, and "
                f"at most {LARGEST_GROWN} are supported; cut the text"
            )

    def _try(self) -> None:
        """Encode a short text: some models lack a token, and some steps have a parameter, with which they fail at the first text only."""
        try:
            self.decode(self.encode(_PROBE))
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise TokenizerError(f"tokenizer {self._origin} cannot encode a text: {error}") from error

    def _special_token_id(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"tokenizer {self._origin} has no {token} token; {PAD_TOKEN}, {EOS_TOKEN} and {MASK_TOKEN} are needed")
        return token_id


def read_tokenizer_file(path: Path) -> bytes:
    """The content of a tokenizer.json, not parsed yet.

    Raises:
        TokenizerError: the file cannot be read, or is too large.
    """
    try:
        return read_bounded(path, LARGEST_TOKENIZER)
    except OSError as error:
        raise TokenizerError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    except FileContentError as error:
        raise TokenizerError(f"tokenizer {error}") from error


def parse_tokenizer_json(serialized: bytes, origin: str) -> dict[str, Any]:
    """The object that a tokenizer.json holds, with its vocabulary and added tokens checked; the library would take memory for any id.

    Raises:
        TokenizerError: it is not JSON or nested too deeply, has no model, or an id is no number below MAX_VOCAB_SIZE.
    """
    try:
        content = parse_json(serialized)
    except ValueError as error:
        raise TokenizerError(f"{origin} is not a tokenizer.json: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise TokenizerError(f"{origin} is not a tokenizer.json: it is no JSON object with a model in it")
    vocabulary, added = content["model"].get("vocab"), content.get("added_tokens") or []
    if not isinstance(vocabulary, dict | list):
        raise TokenizerError(f"{origin} is not a tokenizer.json: its model has no vocabulary")
    # A Unigram model has a list, in which a token's place is its id.
    ids = {**vocabulary} if isinstance(vocabulary, dict) else {"the last token of the vocabulary": len(vocabulary)}
    if not isinstance(added, list) or not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise TokenizerError(f"{origin} is not a tokenizer.json: added_tokens is no list of tokens with a content")
    for token, number in chain(ids.items(), ((token["content"], token.get("id")) for token in added)):
        if type(number) is not int or not 0 <= number < MAX_VOCAB_SIZE:
            raise TokenizerError(
                f"{origin}: the id of {shorten(token)} is {shorten(number)}; ids are numbers from 0 to {MAX_VOCAB_SIZE - 1}"
            )
    return content


@contextlib.contextmanager
def _panics_of(origin: str) -> Iterator[None]:
    """Report a panic of the Rust library, which Python does not count among its exceptions, as what it is: a fault of the file."""
    try:
        yield
    except BaseException as error:
        # The class is made anew by each extension module, and none gives it a name to import.
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"tokenizer {origin} cannot be used: {error}") from error


def _parse(serialized: bytes, origin: str) -> tuple[BackendTokenizer, int]:
    """The library's tokenizer, and how many characters its steps may make of one."""
    content = parse_tokenizer_json(serialized, origin)
    try:
        growth = largest_growth(content)
    except ValueError as error:
        raise TokenizerError(f"tokenizer {origin}: {error}") from error
    with _panics_of(origin):
        try:
            # Not the file's own text: of a key that is there twice, the library may take the other value than the one that was checked.
            backend = BackendTokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise TokenizerError(f"{origin} is not a tokenizer.json: {error}") from error
        backend.encode_special_tokens = True
        # A file saved by other software may carry these; they would cut or pad documents in silence.
        backend.no_truncation()
        backend.no_padding()
    return backend, growth


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    mask_token_id: int = 14,
    digits: Literal["single", "triples", "runs"] = "single",
    whitespace: Literal["runs", "lines"] = "runs",
) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the same texts in the same order give the same file.

    Args:
        digits: pieces of a number: each digit, up to three from the left (Llama 3), or all of it with a leading space (GPT-2).
        whitespace: "runs" = white space is one piece but for its last character (GPT-2); "lines" = the same, but line breaks end
            a piece, with the white space before them, so that no token joins a line's end and the next one's indentation.

    The result has exactly ``vocab_size`` ids if the texts hold enough pairs seen at least twice, fewer (said in the log)
    otherwise; a model's vocabulary may still be ``vocab_size``.

    Raises:
        TokenizerError: if the special tokens and the bytes do not fit in ``vocab_size``, that is above ``MAX_VOCAB_SIZE``,
            ``mask_token_id`` is taken by another special token or too high for the corpus, or there is no text.
    """
    for name, number, limit in (("vocab_size", vocab_size, MAX_VOCAB_SIZE), ("mask_token_id", mask_token_id, MAX_VOCAB_SIZE - 1)):
        if number > limit:
            raise TokenizerError(f"{name} {number} is too large: at most {limit}, for memory is taken for all ids at once")
    special_tokens = special_token_names(mask_token_id)
    mask_is_apart = MIN_NUM_SPECIAL_TOKENS + NUM_BYTES <= mask_token_id < vocab_size < len(special_tokens) + NUM_BYTES
    if mask_is_apart:
        special_tokens = [f"<reserved_{i}>" if name == MASK_TOKEN else name for i, name in enumerate(special_token_names(14))]
    if vocab_size < len(special_tokens) + NUM_BYTES:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small: {len(special_tokens)} special tokens and {NUM_BYTES} bytes need "
            f"{len(special_tokens) + NUM_BYTES} ids"
        )
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(digits, whitespace)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - mask_is_apart,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = iter(texts)
    first_text = next(texts, None)
    if first_text is None:
        raise TokenizerError("no text to train a tokenizer on")
    backend.train_from_iterator(chain([first_text], texts), trainer)
    serialized = backend.to_str(pretty=True)
    if mask_is_apart:
        serialized = _insert_mask(serialized, mask_token_id)
    tokenizer = Tokenizer(serialized.encode("utf-8"), origin="the trained tokenizer")
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "the corpus gave %d token ids of the %d asked for: it has no more pairs seen at least twice", tokenizer.vocab_size, vocab_size
        )
    return tokenizer


def _pre_tokenizer(digits: str, whitespace: str) -> pre_tokenizers.PreTokenizer:
    """What cuts text into the pieces that merges stay inside of."""
    if (digits, whitespace) == ("single", "runs"):
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    pattern = "|".join(
        [
            r"'(?:[sdmt]|ll|ve|re)",
            r" ?\p{L}+",
            {"single": r"\p{N}", "triples": r"\p{N}{1,3}", "runs": r" ?\p{N}+"}[digits],
            r" ?[^\s\p{L}\p{N}]+",
            *([r"\s*[\r\n]+"] if whitespace == "lines" else []),
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _insert_mask(serialized: str, mask_token_id: int) -> str:
    """A tokenizer.json in which the ids from ``mask_token_id`` on have moved up by one, to make place for the mask.

    The library gives a new token the next free id, whatever one asks for; merges name tokens, not ids, and stay as they are.
    """
    record = json.loads(serialized)
    vocabulary = record["model"]["vocab"]
    if len(vocabulary) < mask_token_id:
        raise TokenizerError(
            f"mask_token_id {mask_token_id} cannot be had: the corpus gave only {len(vocabulary)} token ids to come before it; take more "
            "text, or a mask among the first ids (--mask-token-id 14, and diffusion.mask_token_id=14 in training)"
        )
    moved = [(token, token_id + (token_id >= mask_token_id)) for token, token_id in vocabulary.items()]
    record["model"]["vocab"] = dict(sorted([*moved, (MASK_TOKEN, mask_token_id)], key=lambda item: item[1]))
    record["added_tokens"].append(record["added_tokens"][0] | {"id": mask_token_id, "content": MASK_TOKEN})
    return json.dumps(record, indent=2, ensure_ascii=False)


def special_token_names(mask_token_id: int) -> list[str]:
    """Names of the special tokens by id: at least 16, and up to the mask."""
    fixed = [PAD_TOKEN, EOS_TOKEN, BOS_TOKEN]
    if mask_token_id < len(fixed):
        raise TokenizerError(f"mask_token_id must be at least {len(fixed)}, not {mask_token_id}: ids below are {', '.join(fixed)}")
    names = fixed + [f"<reserved_{i}>" for i in range(len(fixed), max(MIN_NUM_SPECIAL_TOKENS, mask_token_id + 1))]
    names[mask_token_id] = MASK_TOKEN
    return names

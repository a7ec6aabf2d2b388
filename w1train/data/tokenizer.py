"""The byte-level BPE tokenizer, a small interface to a Hugging Face ``tokenizers`` file, and its training.

A vocabulary that is trained here begins with the special tokens (``<pad>`` = 0, ``<eos>`` = 1, ``<bos>`` = 2, reserved tokens, and
``<mask>`` at a chosen id). Then come the 256 bytes, and then the merges. A mask id that is too high for this layout (LLaDA's 126336 of
126464) lies among the merges. The tokenizer does not normalise text, so decoding gives back exactly the text that was encoded.

A merge joins no two pieces of the text. By default every digit is a piece, and the GPT-2 pattern cuts all other text: letters and symbols
may have one leading space, and a run of white space without its last character is a piece. :func:`train_tokenizer` offers other rules.
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
from w1train.data.long_runs import LongRuns
from w1train.data.tokenizer_growth import largest_growth
from w1train.runtime.files import write_bytes

logger = logging.getLogger(__name__)

PAD_TOKEN, EOS_TOKEN, BOS_TOKEN, MASK_TOKEN = "<pad>", "<eos>", "<bos>", "<mask>"
MIN_NUM_SPECIAL_TOKENS = 16
NUM_BYTES = 256
MAX_VOCAB_SIZE = 2**24
"""The most ids, dozens of times as many as in the largest vocabularies in use. The library takes memory for all ids before it reads a text,
and aborts if there is not enough."""

LARGEST_TOKENIZER = 64 << 20
"""The most bytes of a tokenizer.json, twice as many as for the largest vocabularies in use."""
LARGEST_GROWN = 1 << 32
"""The most characters that the steps of a tokenizer.json may make of one text. The library takes a hundred bytes of memory for each
character."""
LARGEST_DECODED = 1 << 28
"""The most characters that the decoder of a tokenizer.json may make of the tokens of one call."""
LONGEST_TOKEN = 1 << 16
"""The most characters of a token. The longest tokens of the vocabularies in use have some hundred."""
_PROBE = "Some text, 42 words.\n\tÜ \U0001f600"


class TokenizerError(UserError):
    """The error of a tokenizer file that cannot be used, a vocabulary that cannot be built, or a text that has no tokens."""


class Tokenizer:
    """A tokenizer, which turns text into token ids and back.

    Text is untrusted: if a document contains the characters ``<eos>`` or ``<mask>``, they are encoded as characters, never as the special
    token.
    """

    def __init__(self, serialized: bytes, origin: str) -> None:
        """Parse the content of a tokenizer.json, whose name in error messages is ``origin``."""
        self.serialized: bytes = serialized
        """The content of the tokenizer.json."""
        self._origin = origin
        content = parse_tokenizer_json(serialized, origin)
        self._stated_ids: dict[str, int] = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        self.special_tokens: list[str] = [token["content"] for token in content.get("added_tokens") or [] if token.get("special")]
        """The names of the special tokens."""
        self._backend_for_templates: BackendTokenizer | None = None
        self._backend, self._growth, self._decoded_growth = _parse(content, origin)
        self.fingerprint: str = hashlib.sha256(serialized).hexdigest()
        """SHA-256 of the file: two tokenizers are the same if and only if their files are."""
        self.vocab_size: int = max(self.ids_by_token().values(), default=-1) + 1
        """The largest id plus 1. There may be fewer tokens, because an id below it need not have a token. The model's vocabulary may be
        larger, but never smaller."""
        self.pad_token_id: int = self._special_token_id(PAD_TOKEN)
        self.eos_token_id: int = self._special_token_id(EOS_TOKEN)
        self.mask_token_id: int = self._special_token_id(MASK_TOKEN)
        self._require_own_ids()
        self._try()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            TokenizerError: if the file does not exist, or is not a tokenizer with the special tokens that w1train needs.
        """
        tokenizer = cls(read_tokenizer_file(Path(path)), origin=str(path))
        tokenizer._warn_of_other_ids()
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json, completely or not at all. The file has the fingerprint of this object."""
        write_bytes(path, self.serialized)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without EOS.

        Raises:
            TokenizerError: if the text is not Unicode, or too long for the growth that the tokenizer's steps allow.
        """
        self._require_room([text])
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            # Python puts lone surrogates into a command-line argument that is not UTF-8.
            raise TokenizerError(f"{text[:80]!r} is not Unicode: character {error.start} is a lone surrogate") from error
        with _panics_of(self._origin):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the token ids of a text in which the name of a special token stands for the token. Only a chat template may write such a
        text: in the text of somebody else, a name would end a document or a turn.

        Raises:
            TokenizerError: as :meth:`encode`.
        """
        self._require_room([text])
        if self._backend_for_templates is None:
            with _panics_of(self._origin):
                self._backend_for_templates = BackendTokenizer.from_str(self._backend.to_str())
                self._backend_for_templates.encode_special_tokens = False
        with _panics_of(self._origin):
            return self._backend_for_templates.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, computed on all cores.

        Raises:
            TokenizerError: if a text is too long for the growth that the tokenizer's steps allow.
        """
        self._require_room(texts)
        with _panics_of(self._origin):
            return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Return the text of the ids. Special tokens appear by their names (``<mask>``) or are left out. Broken UTF-8 appears as U+FFFD,
        and an id without a token gives no text.

        Raises:
            TokenizerError: an id is outside the vocabulary, or the text may become too long.
        """
        ids = [int(token_id) for token_id in ids]
        outside = next((token_id for token_id in ids if not 0 <= token_id < self.vocab_size), None)
        if outside is not None:
            # The library would leave such ids out without an error.
            raise TokenizerError(f"token id {outside} is outside the vocabulary of {self._origin} (ids 0 to {self.vocab_size - 1})")
        self._require_room_for_tokens(ids)
        with _panics_of(self._origin):
            return self._backend.decode(ids, skip_special_tokens=skip_special)

    def ids_by_token(self) -> dict[str, int]:
        """Return the id of each token, in the spelling of the file. Special tokens and other added tokens are included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def num_bytes_by_token(self) -> NDArray[np.int64] | None:
        """Return how many bytes of UTF-8 each id stands for, int64 [vocab_size]; None if the tokenizer is not a byte-level tokenizer.

        The numbers are exact, since every character of a byte-level token is one byte of the text. Special tokens, and ids without a token,
        have 0 bytes.
        """
        added = self._backend.get_added_tokens_decoder()
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        num_bytes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, token_id in self.ids_by_token().items():
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

    def _require_room_for_tokens(self, ids: Sequence[int]) -> None:
        """Raise TokenizerError where the decoder might make more characters of the tokens than memory has."""
        if len(ids) * LONGEST_TOKEN * self._decoded_growth <= LARGEST_DECODED:
            return
        num_characters = sum(len(self._backend.id_to_token(token_id) or "") for token_id in ids)
        if num_characters * self._decoded_growth > LARGEST_DECODED:
            raise TokenizerError(
                f"{len(ids)} tokens of {num_characters} characters are too many: the decoder of tokenizer {self._origin} may make "
                f"{self._decoded_growth} characters of each, and at most {LARGEST_DECODED} are supported"
            )

    def _require_own_ids(self) -> None:
        """Raise TokenizerError where <pad>, <eos> or <mask> has the id of another token: documents would contain it where they do not end,
        or would look masked."""
        own = {self.pad_token_id: PAD_TOKEN, self.eos_token_id: EOS_TOKEN, self.mask_token_id: MASK_TOKEN}
        for token, token_id in self.ids_by_token().items():
            if own.get(token_id, token) != token:
                raise TokenizerError(
                    f"tokenizer {self._origin} gives {own[token_id]} and the token {shorten(token)} the same id, {token_id}; "
                    f"{PAD_TOKEN}, {EOS_TOKEN} and {MASK_TOKEN} need ids of their own"
                )

    def _warn_of_other_ids(self) -> None:
        """Warn if the file states an id that the library does not use. For an added token that is outside the model's vocabulary, the
        library chooses the id itself."""
        used = self.ids_by_token()
        other = {token: number for token, number in self._stated_ids.items() if used.get(token) != number}
        if other:
            token, number = next(iter(other.items()))
            logger.warning(
                "tokenizer %s states the id %d for %s, but the tokenizers library gives this token the id %s (tokens with another id: %d); "
                "w1train data import-tokenizer writes a tokenizer.json that keeps the stated ids",
                *(self._origin, number, shorten(token), used.get(token), len(other)),
            )

    def _try(self) -> None:
        """Encode a short text, because the library finds some missing tokens and wrong parameters only when it encodes a text."""
        try:
            self.decode(self.encode(_PROBE))
        except TokenizerError:
            raise
        except Exception as error:  # the library raises a bare Exception for each fault of the file
            raise TokenizerError(f"tokenizer {self._origin} cannot encode a text: {error}") from error

    def _special_token_id(self, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(f"tokenizer {self._origin} has no {token} token; {PAD_TOKEN}, {EOS_TOKEN} and {MASK_TOKEN} are needed")
        return token_id


def read_tokenizer_file(path: Path) -> bytes:
    """Return the content of a tokenizer.json without parsing it.

    Raises:
        TokenizerError: if the file cannot be read, or is too large.
    """
    try:
        return read_bounded(path, LARGEST_TOKENIZER)
    except OSError as error:
        raise TokenizerError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    except FileContentError as error:
        raise TokenizerError(f"tokenizer {error}") from error


def parse_tokenizer_json(serialized: bytes, origin: str) -> dict[str, Any]:
    """Return the object in a tokenizer.json, and check its vocabulary and added tokens, because the library takes memory for any id.

    Raises:
        TokenizerError: if the text is not JSON or nested too deeply, has no model, or has an id that is not a number below MAX_VOCAB_SIZE.
    """
    try:
        content = parse_json(serialized)
    except ValueError as error:
        raise TokenizerError(f"{origin} is not a tokenizer.json: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise TokenizerError(f"{origin} is not a tokenizer.json: it is not a JSON object with a model in it")
    vocabulary, added = content["model"].get("vocab"), content.get("added_tokens") or []
    if not isinstance(vocabulary, dict | list):
        raise TokenizerError(f"{origin} is not a tokenizer.json: its model has no vocabulary")
    # The vocabulary of a Unigram model is a list, in which the place of a token is its id.
    ids = {**vocabulary} if isinstance(vocabulary, dict) else {"the last token of the vocabulary": len(vocabulary)}
    if not isinstance(added, list) or not all(isinstance(token, dict) and isinstance(token.get("content"), str) for token in added):
        raise TokenizerError(f"{origin} is not a tokenizer.json: added_tokens is not a list of tokens with a content")
    for token, number in chain(ids.items(), ((token["content"], token.get("id")) for token in added)):
        if type(number) is not int or not 0 <= number < MAX_VOCAB_SIZE:
            raise TokenizerError(
                f"{origin}: the id of {shorten(token)} is {shorten(number)}; ids are numbers from 0 to {MAX_VOCAB_SIZE - 1}"
            )
        if len(token) > LONGEST_TOKEN:
            raise TokenizerError(f"{origin}: the token {shorten(token)} has {len(token)} characters; at most {LONGEST_TOKEN} are supported")
    return content


@contextlib.contextmanager
def _panics_of(origin: str) -> Iterator[None]:
    """Raise TokenizerError for a panic of the Rust library, which is a fault of the file but, for Python, not an Exception."""
    try:
        yield
    except BaseException as error:
        # Each extension module makes this class anew, and no module exports it.
        if type(error).__name__ != "PanicException":
            raise
        # The library's regular expressions give up after ten million attempts, and some make an attempt for each blank of a run.
        if "retry-limit" in str(error):
            reason = "a text has a run of millions of blanks, which is too long for its regular expressions; cut the text"
            raise TokenizerError(f"tokenizer {origin} cannot encode a text: {reason} ({error})") from error
        raise TokenizerError(f"tokenizer {origin} cannot be used: {error}") from error


def _parse(content: dict[str, Any], origin: str) -> tuple[BackendTokenizer, int, int]:
    """Return the library's tokenizer, and the largest number of characters into which its steps may turn one character, for encoding and
    for decoding."""
    try:
        encoding, decoding = largest_growth(content)
    except ValueError as error:
        raise TokenizerError(f"tokenizer {origin}: {error}") from error
    with _panics_of(origin):
        try:
            # The library does not get the file's own text: if a key occurs twice there, it may take the value that was not checked.
            backend = BackendTokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises a bare Exception for each fault of the file
            raise TokenizerError(f"{origin} is not a tokenizer.json: {error}") from error
        backend.encode_special_tokens = True
        # A file of other software may ask for truncation or padding, which would change documents without an error.
        backend.no_truncation()
        backend.no_padding()
    return backend, encoding, decoding


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    mask_token_id: int = 14,
    digits: Literal["single", "triples", "runs"] = "single",
    whitespace: Literal["runs", "lines"] = "runs",
) -> Tokenizer:
    """Train a byte-level BPE tokenizer. The same texts in the same order give the same file.

    A run of more than LONGEST_RUN letters and digits, of white space or of other characters is cut for the training (long_runs.py), and
    the log says it.

    Args:
        digits: pieces of a number: each digit, up to three digits from the left (Llama 3), or the whole number with a leading space
            (GPT-2).
        whitespace: "runs" = a run of white space without its last character is a piece (GPT-2); "lines" = the same, but a line break ends
            a piece, which includes the white space before it, so that no token joins the end of a line with the next line's indentation.

    Returns:
        A tokenizer with exactly ``vocab_size`` ids if enough pairs occur at least twice in the texts, otherwise with fewer ids, which the
        log says. A model's vocabulary may still be ``vocab_size``.

    Raises:
        TokenizerError: if the special tokens and the bytes do not fit into ``vocab_size``, ``vocab_size`` is above ``MAX_VOCAB_SIZE``,
            ``mask_token_id`` belongs to another special token or is too high for the corpus, or there is no text.
    """
    _require_limits(vocab_size, mask_token_id)
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
    backend.train_from_iterator(LongRuns().cut(chain([first_text], texts)), trainer)
    serialized = backend.to_str(pretty=True)
    if mask_is_apart:
        serialized = _insert_mask(serialized, mask_token_id)
    tokenizer = Tokenizer(serialized.encode("utf-8"), origin="the trained tokenizer")
    if tokenizer.vocab_size < vocab_size:
        logger.warning(
            "the corpus gave %d token ids of the %d asked for: it has no more pairs seen at least twice", tokenizer.vocab_size, vocab_size
        )
    return tokenizer


def _require_limits(vocab_size: int, mask_token_id: int) -> None:
    """Raise TokenizerError for sizes that are too large."""
    for name, number, limit in (("vocab_size", vocab_size, MAX_VOCAB_SIZE), ("mask_token_id", mask_token_id, MAX_VOCAB_SIZE - 1)):
        if number > limit:
            raise TokenizerError(
                f"{name} {number} is too large: at most {limit} is allowed, because the library takes memory for all ids at once"
            )


def _pre_tokenizer(digits: str, whitespace: str) -> pre_tokenizers.PreTokenizer:
    """Return the step that cuts text into the pieces that no merge joins."""
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
    """Return a tokenizer.json in which the mask has ``mask_token_id``, and the ids from there on are one higher than before.

    The library cannot do this, because it gives a new token the next free id. Merges name tokens, not ids, and do not change.
    """
    record = json.loads(serialized)
    vocabulary = record["model"]["vocab"]
    if len(vocabulary) < mask_token_id:
        raise TokenizerError(
            f"mask_token_id {mask_token_id} is too high: the corpus gave only {len(vocabulary)} token ids before it. Use more "
            "text, or a mask among the first ids (--mask-token-id 14, and diffusion.mask_token_id=14 in training)"
        )
    moved = [(token, token_id + (token_id >= mask_token_id)) for token, token_id in vocabulary.items()]
    record["model"]["vocab"] = dict(sorted([*moved, (MASK_TOKEN, mask_token_id)], key=lambda item: item[1]))
    record["added_tokens"].append(record["added_tokens"][0] | {"id": mask_token_id, "content": MASK_TOKEN})
    return json.dumps(record, indent=2, ensure_ascii=False)


def special_token_names(mask_token_id: int) -> list[str]:
    """Return the names of the special tokens by id: at least 16 names, up to the mask."""
    fixed = [PAD_TOKEN, EOS_TOKEN, BOS_TOKEN]
    if mask_token_id < len(fixed):
        raise TokenizerError(f"mask_token_id must be at least {len(fixed)}, not {mask_token_id}: ids below are {', '.join(fixed)}")
    names = fixed + [f"<reserved_{i}>" for i in range(len(fixed), max(MIN_NUM_SPECIAL_TOKENS, mask_token_id + 1))]
    names[mask_token_id] = MASK_TOKEN
    return names

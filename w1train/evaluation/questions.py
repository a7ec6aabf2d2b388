"""Texts to score: a JSONL file of completions, or of questions with several choices, and a model's answers to them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w1train.config.errors import UserError
from w1train.config.reading import FileContentError, parse_json, require_regular
from w1train.config.schema import Config
from w1train.data.text.decompress import DamagedError, WindowError
from w1train.data.text.file_names import CorpusError, kind_of, unsupported_compression
from w1train.data.text.json_records import BYTE_ORDER_MARK, RecordReader

logger = logging.getLogger(__name__)

if TYPE_CHECKING:  # torch and megatron-core take seconds to import, which a mistake in the file should not wait for
    from w1train.evaluation.likelihood import Pair
    from w1train.inference.predictor import InferenceModel

FORMATS = '{"prompt": TEXT, "completion": TEXT} or {"prompt": TEXT, "choices": [TEXT, TEXT, ...], "answer": INDEX}'
_LARGEST = 256 << 20
"""The most bytes of a file of questions; benchmarks of ten thousand questions have some ten megabytes."""


@dataclass(frozen=True, slots=True)
class Question:
    """One line of the file, or one text."""

    line: int
    """The number of the line, or of the text."""
    prompt: str
    choices: tuple[str, ...]
    """A line with a completion has one choice."""
    answer: int
    """Index of the right choice, from 0."""
    kind: str = "line"
    """The word for this question in messages, which have its number too."""

    @property
    def name(self) -> str:
        """The question in a message, for example "line 3"."""
        return f"{self.kind} {self.line}"

    @property
    def has_choices(self) -> bool:
        return len(self.choices) > 1


@dataclass(frozen=True, slots=True)
class Answer:
    """The likelihoods that a model gives to the choices of a question."""

    question: Question
    log_likelihoods: tuple[float, ...]
    """The log-likelihood of each choice, in nats."""
    num_tokens: tuple[int, ...]
    """Tokens of each choice."""

    @property
    def num_bytes(self) -> tuple[int, ...]:
        """Count the UTF-8 bytes of each choice."""
        return tuple(len(choice.encode()) for choice in self.question.choices)

    @property
    def chosen(self) -> int:
        """Return the index of the likeliest choice."""
        return _argmax(self.log_likelihoods)

    @property
    def chosen_by_byte(self) -> int:
        """Return the index of the choice that is likeliest per byte. The total likelihood would favour short choices."""
        return _argmax([value / size for value, size in zip(self.log_likelihoods, self.num_bytes, strict=True)])


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file, which may be compressed, or an array in a .json file, as the data tools read it. Empty lines are
    skipped.

    Raises:
        UserError: the file cannot be read, is not a regular file, is too large or empty; or a line does not have a form of FORMATS (the
            message gives the line's number).
    """
    try:
        lines = _read(path).decode("utf-8").split("\n")  # splitlines() would also cut at U+2028, which JSON texts may have
    except (OSError, UnicodeDecodeError, CorpusError, DamagedError, WindowError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    questions = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f"{path} has no lines; each must be {FORMATS}")
    return questions


def _read(path: Path) -> bytes:
    require_regular(path)
    kind = kind_of(str(path))
    if kind in ("parquet", "arrow"):
        raise CorpusError("it is a table by its name, and questions are read as JSONL or .json: write each row as a line of JSON")
    if fault := unsupported_compression(str(path)):
        raise CorpusError(fault)
    content = bytearray()
    with RecordReader(str(path), "json" if kind == "json" else "jsonl") as reader:
        for chunk in reader.chunks():
            content += chunk
            if len(content) > _LARGEST:
                raise FileContentError(f"{path} is too large: it has more than {_LARGEST:,} bytes")
    return bytes(content)


def _parse(path: Path, number: int, line: str) -> Question:
    try:
        record = parse_json(line.removeprefix(BYTE_ORDER_MARK))
        json.dumps(record, ensure_ascii=False).encode("utf-8")  # A lone \ud800 cannot be encoded.
    except ValueError as error:
        raise UserError(f"{path}, line {number}, is not JSON ({error}); it must be {FORMATS}") from error
    match record:
        case {"prompt": str(prompt), "completion": str(completion)} if completion and len(record) == 2:
            return Question(number, prompt.removeprefix(BYTE_ORDER_MARK), (completion,), 0)
        case {"prompt": str(prompt), "choices": [_, _, *_] as choices, "answer": int(answer)} if len(record) == 3:
            if all(isinstance(choice, str) and choice for choice in choices) and type(answer) is int and 0 <= answer < len(choices):
                return Question(number, prompt.removeprefix(BYTE_ORDER_MARK), tuple(choices), answer)
    raise UserError(f"{path}, line {number}, is {line[:80]!r}; it must be {FORMATS}, with no text but the prompt empty, answers from 0")


def answer_questions(model: InferenceModel, questions: Sequence[Question], *, num_draws: int, batch_size: int) -> list[Answer]:
    """Score every choice of every question. The prompt and the choice are tokenized separately, because a model that continues a prompt
    also reads a prompt that was tokenized alone.

    Raises:
        UserError: a text is too long for the model, or has mask tokens or ids that are outside model.vocab_size; or the model was not
            trained with noise on the mask token alone.
    """
    from w1train.diffusion.processes import noise_process
    from w1train.evaluation.likelihood import log_likelihoods

    _require_masks(model.config)
    pairs = [_tokenize(model, question, choice) for question in questions for choice in question.choices]
    scores = log_likelihoods(
        model.predict,
        pairs,
        mask_token_id=model.config.diffusion.mask_token_id,
        vocab_size=model.config.model.vocab_size,
        num_draws=num_draws,
        batch_size=batch_size,
        device=model.device,
        timestep_at=noise_process(model.config.diffusion).timestep_at,
    )
    scored = iter(zip(scores, pairs, strict=True))
    answers = []
    for question in questions:
        own = [next(scored) for _ in question.choices]
        answers.append(Answer(question, tuple(score for score, _ in own), tuple(len(pair.completion) for _, pair in own)))
    return answers


def _require_masks(config: Config) -> None:
    """Raise UserError if completions cannot be scored by masking tokens: the cross-entropy of masked tokens must be the bound."""
    from w1train.diffusion.processes import noise_process

    process = noise_process(config.diffusion)
    if process.bound != "cross_entropy":
        raise UserError(
            f"the run was trained by {process.name} (diffusion.objective={config.diffusion.objective}); likelihoods of completions are "
            "estimated by masking tokens, which needs a run of masked diffusion (diffusion.objective=diffusion). w1train evaluate RUN "
            "without --likelihood gives the bound on a validation set for every process"
        )


def warn_of_blocks(config: Config) -> None:
    """Warn if a completion is scored in another way than the model was trained in."""
    block_size, sequence_length = config.diffusion.block_size, config.data.sequence_length
    if block_size is not None and block_size < sequence_length:
        logger.warning(
            "the run was trained to denoise blocks of %d tokens after clean blocks; here a completion is scored as one block, "
            "in which every token attends to every other token",
            block_size,
        )


def _tokenize(model: InferenceModel, question: Question, choice: str) -> Pair:
    from w1train.evaluation.likelihood import Pair

    pair = Pair(tuple(model.tokenizer.encode(question.prompt)), tuple(model.tokenizer.encode(choice)))
    limit, mask = model.config.model.max_sequence_length, model.config.diffusion.mask_token_id
    if max(pair.tokens, default=0) >= (vocab_size := model.config.model.vocab_size):
        raise UserError(
            f"{question.name} has the token id {max(pair.tokens)}, and model.vocab_size is {vocab_size}: the tokenizer is not that of "
            "the model"
        )
    if mask in pair.tokens:
        raise UserError(f"{question.name} has the mask token ({mask}) in its text; only clean text can be scored")
    if len(pair.tokens) > limit:
        raise UserError(
            f"{question.name} has {len(pair.prompt)} + {len(pair.completion)} tokens, more than model.max_sequence_length = {limit}"
        )
    return pair


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the likelihood of right completions in nats per token and bits per byte, and the accuracy on questions with choices."""
    right = [
        (answer.log_likelihoods[index], answer.num_tokens[index], answer.num_bytes[index])
        for answer in answers
        for index in [answer.question.answer]
    ]
    nats, num_tokens, num_bytes = (sum(values) for values in zip(*right, strict=True))
    asked = [answer for answer in answers if answer.question.has_choices]
    by_likelihood = sum(answer.chosen == answer.question.answer for answer in asked)
    by_byte = sum(answer.chosen_by_byte == answer.question.answer for answer in asked)
    return {
        "num_texts": len(answers),
        "num_tokens": num_tokens,
        "nats_per_token": -nats / num_tokens,
        "bits_per_byte": -nats / (num_bytes * math.log(2)),
        "num_questions": len(asked),
        "accuracy": by_likelihood / len(asked) if asked else None,
        "accuracy_by_byte": by_byte / len(asked) if asked else None,
    }


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])

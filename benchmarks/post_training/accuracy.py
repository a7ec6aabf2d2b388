"""Exact answers of the models of `make post-training` to the held-out questions, and how many forward passes they take.

    python -m benchmarks.post_training.accuracy runs/post_training/sft --data runs/post_training-data --thresholds 0.5 0.9

Answers are greedy. An answer is right if it is the expected text, up to the first end of the document or line break. Without a threshold,
each pass decides one token. With a threshold, each pass decides all tokens that are more probable (w1train/sampling/counts.py). The tokens
of an answer are its characters and its end: the fill after the end takes passes too, and does not count as tokens.

The model also greets held-out people, which tells how often it takes the style that is preferred. The result is in RUN/answers.json.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.post_training.made_questions import CANVAS, TASKS, Preference, Question
from benchmarks.post_training.question_texts import read_preferences, read_questions
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.runtime.command import command
from w1train.runtime.files import write_text

if TYPE_CHECKING:  # The import takes seconds, which --help should not wait for.
    from w1train.inference.predictor import InferenceModel

ANSWERS = "answers.json"
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_NUM_EXAMPLES = 2


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of a model."""

    text: str
    num_tokens: int
    num_passes: int


def replies(model: InferenceModel, prompts: Sequence[str], threshold: float | None) -> list[Reply]:
    """Let the model answer, prompts of one length at a time: a canvas has as many tokens as a document has in training."""
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    found: dict[int, Reply] = {}
    for numbers in by_length.values():
        found |= zip(numbers, _batch(model, [prompts[number] for number in numbers], threshold), strict=True)
    return [found[number] for number in range(len(prompts))]


def _batch(model: InferenceModel, prompts: Sequence[str], threshold: float | None) -> list[Reply]:
    from w1train.sampling.text import sample_texts

    texts = [f"{prompt}\n" for prompt in prompts]
    num_tokens = CANVAS - len(texts[0])
    sampling = replace(
        model.config.sampling, num_tokens=num_tokens, num_steps=num_tokens, threshold=threshold, temperature=0.0, remasking="low_confidence"
    )
    config = replace(model.config, sampling=sampling)
    return [
        # A text without an end has no token for it.
        Reply(sample.text.partition("\n")[0], min(len(sample.tokens) + 1, num_tokens), sample.num_forward_passes)
        for sample in sample_texts(model.predict, model.tokenizer, texts, config, device=model.device)
    ]


def measured(questions: Sequence[Question], answers: Sequence[Reply]) -> dict[str, Any]:
    """Return the share of right answers, of all tasks and of each, and the tokens and passes of all answers."""
    is_right: dict[str, list[bool]] = {name: [] for name in TASKS}
    for question, reply in zip(questions, answers, strict=True):
        is_right[question.task].append(reply.text == question.answer)
    right = [each for found in is_right.values() for each in found]
    num_tokens, num_passes = (sum(getattr(reply, name) for reply in answers) for name in ("num_tokens", "num_passes"))
    return {
        "accuracy": sum(right) / len(right),
        "by_task": {name: sum(found) / len(found) for name, found in is_right.items() if found},
        "num_tokens": num_tokens,
        "num_passes": num_passes,
        "tokens_per_pass": num_tokens / num_passes,
    }


def preferred_share(preferences: Sequence[Preference], answers: Sequence[Reply]) -> dict[str, float]:
    """Return the shares of the greetings in the preferred style and in the other style; the rest is neither."""
    pairs = list(zip(preferences, answers, strict=True))
    return {
        "chosen": sum(reply.text == pair.chosen for pair, reply in pairs) / len(pairs),
        "rejected": sum(reply.text == pair.rejected for pair, reply in pairs) / len(pairs),
    }


def answer(model: InferenceModel, data: Path, thresholds: Sequence[float]) -> dict[str, Any]:
    """Let the model answer all questions, without a threshold and with each, and return what RUN/answers.json has."""
    questions, preferences = read_questions(data), read_preferences(data)
    prompts = [question.prompt for question in questions]
    careful = replies(model, prompts, None)
    curve = [{"threshold": each, **measured(questions, replies(model, prompts, each))} for each in thresholds]
    shown = [(question, reply) for question, reply in zip(questions, careful, strict=True)]
    return {
        "step": model.step,
        "num_questions": len(questions),
        "one_token_a_pass": measured(questions, careful),
        "curve": curve,
        "greetings": preferred_share(preferences, replies(model, [pair.prompt for pair in preferences], None)),
        "examples": [{**asdict(question), "reply": reply.text} for question, reply in shown[: _NUM_EXAMPLES * len(TASKS)]],
    }


@command("benchmarks.post_training.accuracy")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input."""
    parser = ArgumentParser(prog="python -m benchmarks.post_training.accuracy", description="Let a model answer the held-out questions.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run directory, such as runs/post_training/sft")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the directory of the questions")
    parser.add_argument(
        "--thresholds", type=float, nargs="*", default=THRESHOLDS, metavar="P", help="thresholds of confidence (default: nine)"
    )
    options = parser.parse_args(arguments)
    from w1train.guest import world_of_one
    from w1train.trained_model import load_trained

    try:
        with world_of_one(None) as ranks:
            result = answer(load_trained(options.run, None, ranks), options.data, options.thresholds)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(options.run / ANSWERS, json.dumps(result, indent=1) + "\n")
    print(f"{options.run.name}: {result['one_token_a_pass']['accuracy']:.1%} right, one token a pass; greetings {result['greetings']}")
    for point in result["curve"]:
        print(f"  threshold {point['threshold']}: {point['accuracy']:.1%} right, {point['tokens_per_pass']:.2f} tokens a pass")
    return 0


if __name__ == "__main__":
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())

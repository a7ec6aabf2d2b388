"""The command that evaluates a checkpoint.

    w1train evaluate RUN
    w1train evaluate RUN --checkpoint average --validation data/other --json
    w1train evaluate RUN --likelihood questions.jsonl --draws 128

Without --likelihood, it repeats the validation of training: the 1/t ELBO in nats per token and bits per byte, and the masked cross-entropy,
also by timestep. With --likelihood, it estimates log-likelihoods of completions by LLaDA's exact-count estimator
(w1train/evaluation/likelihood.py), and the accuracy for questions with choices.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from w1train.config.argument_parser import ArgumentParser, number_in
from w1train.config.constraints import Range
from w1train.config.errors import UserError
from w1train.evaluation.draws import DEFAULT_DRAWS, MAX_DRAWS
from w1train.evaluation.questions import FORMATS, Answer, Question, answer_questions, read_questions, summarize, warn_of_blocks
from w1train.runtime.command import command
from w1train.runtime.masking import mask, unmasked
from w1train.trained_model import load_trained, require_run


@command("w1train evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input; the reason is on stderr."""
    args = _parse(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        questions = None if args.likelihood is None else read_questions(args.likelihood)
        require_run(args.run)
        result = _evaluate(args, questions)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**result, "run": mask(result["run"])}), file=unmasked(sys.stdout))
    else:
        print("\n".join(_validation_lines(result) if questions is None else _likelihood_lines(result)))
    return 0


def _evaluate(args: argparse.Namespace, questions: list[Question] | None) -> dict[str, Any]:
    model = load_trained(args.run, args.checkpoint)
    from w1train.evaluation.checkpoint_validation import validation_of
    from w1train.inference.predictor import require_diffusion

    result = {"run": str(args.run), "checkpoint": model.checkpoint.name}
    if questions is None:
        return {**result, **validation_of(model, args.validation)}
    require_diffusion(model)
    warn_of_blocks(model.config)
    answers = answer_questions(model, questions, num_draws=args.draws, batch_size=args.batch_size)
    return {**result, "draws": args.draws, **summarize(answers), "texts": [_as_json(answer) for answer in answers]}


def _validation_lines(result: dict[str, Any]) -> list[str]:
    bits = result["elbo_bits_per_byte"]
    lines = [
        f"{result['run']}, {result['checkpoint']}",
        f"ELBO                  {result['elbo']:.4f} nats per token",
        *([] if bits is None else [f"                      {bits:.4f} bits per byte"]),
        *(
            f"at block size {key.partition('/')[2]:<8}{value:.4f} nats per token"
            for key, value in result.items()
            if key.startswith("elbo_at_block_size/")
        ),
        f"masked cross-entropy  {result['masked_cross_entropy']:.4f} nats per masked token",
        "",
        "     t  cross-entropy",
    ]
    return lines + [f"{t:6.3f}  {loss:13.4f}" for t, loss in zip(result["timesteps"], result["loss_by_t"], strict=True)]


def _likelihood_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['run']}, {result['checkpoint']}, {result['draws']} draws",
        f"texts           {result['num_texts']}",
        f"of right texts  {result['nats_per_token']:.4f} nats per token, {result['bits_per_byte']:.4f} bits per byte",
    ]
    if result["num_questions"]:
        lines.append(
            f"accuracy        {result['accuracy']:.2%} by likelihood, {result['accuracy_by_byte']:.2%} by likelihood per byte "
            f"({result['num_questions']} questions)"
        )
    heading = ["", "  line   right  chosen  log-likelihoods"]
    rows = []
    for text in result["texts"]:
        values = "  ".join(f"{value:.3f}" for value in text["log_likelihoods"])
        chosen = str(text["chosen"]) if len(text["log_likelihoods"]) > 1 else ""
        right = str(text["answer"]) if chosen else ""
        rows.append(f"{text['line']:6d}  {right:>6}  {chosen:>6}  {values}")
    return [*lines, *heading, *rows]


def _as_json(answer: Answer) -> dict[str, Any]:
    return {
        "line": answer.question.line,
        "answer": answer.question.answer,
        "chosen": answer.chosen,
        "chosen_by_byte": answer.chosen_by_byte,
        "log_likelihoods": list(answer.log_likelihoods),
        "num_tokens": list(answer.num_tokens),
        "num_bytes": list(answer.num_bytes),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="w1train evaluate", description="Evaluate a checkpoint, in this process alone.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/demo")
    parser.add_checkpoint_option()
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--validation", metavar="PREFIX", help="validation set to use instead of the run's")
    what.add_argument(
        "--likelihood", type=Path, metavar="FILE", help=f"score the completions in a JSONL file, in which each line is {FORMATS}"
    )
    draws, rows = number_in(int, Range(1, MAX_DRAWS)), number_in(int, Range(1))
    draws_help = "random masks for each completion (default: %(default)s)"
    parser.add_argument("--draws", type=draws, default=DEFAULT_DRAWS, metavar="N", help=draws_help)
    rows_help = "largest number of rows in a forward pass (default: %(default)s)"
    parser.add_argument("--batch-size", type=rows, default=32, metavar="N", help=rows_help)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())

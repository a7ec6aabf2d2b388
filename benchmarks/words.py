"""The check of a run's text: how many of the words that the model writes occur in the text that it was trained on?

    make demo
    python -m benchmarks.words runs/demo --report

A word is three or more letters in a row; digits and underscores separate words, and capitals count. The model completes the prompts of the
run's sampling settings in turn, each time with other noise. The words of the prompts do not count, and neither does a last word that the
end of the sample may have cut. The result is written to the run's summary.json, under "words". With --report, the run's numbers and some of
its samples are written to benchmarks/results/YYYY-MM-DD-demo.md.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common.results_page import Table, environment, write_report
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.config.reading import read_json_object
from w1train.config.schema import SamplingConfig
from w1train.data.sharded_dataset import open_dataset
from w1train.data.tokenizer import Tokenizer
from w1train.records.summary import add_to_summary
from w1train.runtime.command import command
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.sampling.text import TextSample, sample_texts

if TYPE_CHECKING:  # The import takes seconds, which --help should not wait for.
    from w1train.inference.predictor import InferenceModel

_WORD = re.compile(r"[^\W\d_]{3,}")
_MOST_UNKNOWN = 20
"""The most words that summary.json lists as unknown."""


def words(text: str) -> list[str]:
    """Return the words of a text, in order."""
    return _WORD.findall(text)


def written_words(sample: TextSample, num_tokens: int) -> list[str]:
    """Return the words that the model has written whole; a sample of ``num_tokens`` tokens has no end of its own, and may end in a word."""
    text = sample.prompt + sample.text
    may_be_cut = len(sample.tokens) == num_tokens
    found = (match for match in _WORD.finditer(text) if match.end() > len(sample.prompt))
    return [match.group() for match in found if not (may_be_cut and match.end() == len(text))]


def check_words(samples: Iterable[TextSample], num_tokens: int, known: Collection[str]) -> dict[str, Any]:
    """Compare the words of samples with known words.

    Returns:
        num_samples, num_words, share_in_corpus (in [0, 1]; None without words), and some of the words that are not in the corpus.
    """
    by_sample = [written_words(sample, num_tokens) for sample in samples]
    written = [word for each in by_sample for word in each]
    unknown = [word for word in written if word not in known]
    return {
        "num_samples": len(by_sample),
        "num_words": len(written),
        "share_in_corpus": 1 - len(unknown) / len(written) if written else None,
        "not_in_corpus": sorted(set(unknown))[:_MOST_UNKNOWN],
    }


def corpus_words(prefixes: Iterable[str], tokenizer: Tokenizer) -> set[str]:
    """Return the words of the training datasets with these prefixes. The text that is held out for validation is not in them."""
    found: set[str] = set()
    for prefix in prefixes:
        dataset = open_dataset(prefix)
        for document in range(dataset.num_documents):
            found.update(words(tokenizer.decode(dataset.document_tokens(document).tolist(), skip_special=True)))
    return found


def sample_and_check(model: InferenceModel, num_samples: int) -> tuple[list[TextSample], dict[str, Any]]:
    """Sample from a model, and return the samples with the result of their check."""
    from w1train.training.training_data import training_prefixes

    config = model.config
    prompts = list(islice(cycle(config.sampling.prompts), num_samples))
    samples = sample_texts(model.blocks or model.predict, model.tokenizer, prompts, config, device=model.device)
    known = corpus_words(training_prefixes(config), model.tokenizer)
    return samples, check_words(samples, config.sampling.num_tokens, known)


@command("benchmarks.words")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input; the reason is on stderr."""
    parser = ArgumentParser(
        prog="python -m benchmarks.words", description="Say how many of the words that a run's model writes occur in its corpus."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/demo")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="number of samples (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    import_megatron()
    from w1train.checkpoints.manifest import CheckpointError
    from w1train.inference.predictor import load_for_inference, require_diffusion

    try:
        model = load_for_inference(options.run)
        require_diffusion(model)
        samples, result = sample_and_check(model, options.samples)
        add_to_summary(options.run, {"words": result})
    except (UserError, FileNotFoundError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = samples[: len(model.config.sampling.prompts)]
    for sample in shown:
        print(f"{sample.prompt}{sample.text}\n---")
    print(_sentence(result))
    if options.report:
        summary = read_json_object(options.run / "summary.json", "summary")
        tables = [_numbers(summary), environment(f"make demo; python -m benchmarks.words {options.run} --report")]
        print(write_report("demo", "The demo", tables, _notes(summary, model.config.sampling, shown)))
    return 0


def _numbers(summary: dict[str, Any]) -> Table:
    words_of_samples = summary["words"]
    rows = [
        ("parameters", f"{summary['num_parameters']:,}"),
        ("steps", f"{summary['steps']:,}"),
        ("tokens", f"{summary['tokens_seen']:,}"),
        ("tokens/s in the steps", f"{summary['tokens_per_second']:,.0f}"),
        ("seconds of training, with validation, samples and saves", f"{summary['wall_seconds']:,.0f}"),
        ("validation at the start, bits per byte", f"{summary['validation_elbo_bits_per_byte_start']:.3f}"),
        ("validation at the end, bits per byte", f"{summary['validation_elbo_bits_per_byte_end']:.3f}"),
        ("unigram model, bits per byte", f"{summary['unigram_bits_per_byte']:.3f}"),
        (f"words in {words_of_samples['num_samples']} samples", f"{words_of_samples['num_words']:,}"),
        ("words that occur in the training text", f"{words_of_samples['share_in_corpus']:.1%}"),
    ]
    return Table("The run", ("", ""), rows)


def _notes(summary: dict[str, Any], sampling: SamplingConfig, samples: Sequence[TextSample]) -> str:
    """Return what the numbers mean, the settings of the samples, and some samples, as Markdown."""
    how = f"{sampling.num_tokens} tokens in {sampling.num_steps} steps, temperature {sampling.temperature}, {sampling.remasking}"
    texts = "\n\n".join(f"```text\n{sample.prompt}{sample.text}\n```" for sample in samples)
    return f"Validation is {summary['validation_bound']}.\n\nThe first samples ({how}, seed {sampling.seed}):\n\n{texts}"


def _sentence(result: dict[str, Any]) -> str:
    if not result["num_words"]:
        return f"The {result['num_samples']} samples have no words of three letters and more."
    return (
        f"{result['share_in_corpus']:.1%} of the {result['num_words']} words in {result['num_samples']} samples occur in the training text."
    )


if __name__ == "__main__":
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())

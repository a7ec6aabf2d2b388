"""Self-correction in `make processes`: does a model that was trained on wrong tokens repair them?

    python -m benchmarks.processes.correct runs/processes

A tenth of the characters of held-out texts is replaced by other characters. The models of p_u = 0.2, 0.1 and 0 then revise the texts by
conditional modes (w1train/sampling/conditional_modes.py) and by GIDD's self-correction (arXiv 2503.04482), all with the same assumed noise.
The result is written to RUNS/correction.json: the share of wrong characters that were repaired, the share of right characters that were
changed, how many wrong characters each text has lost, and of the texts before and after the bits per character under the autoregressive
model, with the entropy of their characters: a text that repeats one character is probable, and has no entropy. It also has how well each
model finds wrong characters: by the probability of the present character, and by that of the new character, by which GIDD's rule ranks.

Shapes: b = texts, l = characters of a text.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import dataclasses
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.processes.characters import NUM_TEXT_IDS
from benchmarks.processes.trainings import ASSUMED_NOISE, CORRECTION, CORRECTIONS, JUDGE
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.config.schema import DiffusionConfig, ParallelConfig
from w1train.data.batch import PackedBatch
from w1train.data.sharded_dataset import open_dataset
from w1train.diffusion.corruption import corrupt_at
from w1train.runtime.command import command
from w1train.runtime.files import write_text
from w1train.runtime.megatron_on_cpu import import_megatron

if TYPE_CHECKING:  # The import takes seconds, which --help should not wait for.
    from w1train.inference.predictor import InferenceModel

SHARE = 0.1
"""Share of the characters that are replaced."""
_SEED = 0
_NUM_EXAMPLES = 2


@dataclass(frozen=True, slots=True)
class Corrupted:
    """Texts of which some characters were replaced."""

    original: Tensor
    """int64 [b, l]."""
    tokens: Tensor
    """int64 [b, l], after the replacement."""

    @property
    def is_wrong(self) -> Tensor:
        """The replaced characters, bool [b, l]."""
        return self.tokens != self.original


def held_out_texts(prefix: str, num_texts: int, length: int) -> Tensor:
    """Return pieces of the documents of a dataset, int64 [at most num_texts, length]. Each document that is long enough gives as many
    pieces as any other."""
    dataset = open_dataset(prefix)
    num_pieces = -(-num_texts // dataset.num_documents)
    pieces = []
    for document in range(dataset.num_documents):
        tokens = torch.from_numpy(dataset.document_tokens(document).astype("int64"))
        whole = tokens[: len(tokens) // length * length].reshape(-1, length)
        pieces.append(whole[:: max(1, len(whole) // num_pieces)][:num_pieces])
    return torch.cat(pieces)[:num_texts]


def corrupted(original: Tensor, seed: int = _SEED) -> Corrupted:
    """Replace a share of SHARE of the tokens of each text by other tokens, all equally probable."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(original.shape, generator=generator).argsort(dim=1)
    is_replaced = torch.zeros(original.shape, dtype=torch.bool).scatter(1, order[:, : round(SHARE * original.shape[1])], True)
    # A step of at least 1 and at most the number of ids - 1 around the ring of the ids never ends where it began.
    others = (original + torch.randint(1, NUM_TEXT_IDS, original.shape, generator=generator)) % NUM_TEXT_IDS
    return Corrupted(original, torch.where(is_replaced, others, original))


def repair(texts: Corrupted, tokens: Tensor) -> dict[str, float]:
    """Compare revised texts, int64 [b, l], with the original texts."""
    is_wrong = texts.is_wrong
    fewer = is_wrong.sum(dim=1).double() - (tokens != texts.original).sum(dim=1)
    return {
        "repaired": (tokens == texts.original)[is_wrong].float().mean().item(),
        "damaged": (tokens != texts.original)[~is_wrong].float().mean().item(),
        "wrong": (tokens != texts.original).float().mean().item(),
        "fewer": fewer.mean().item(),
        "fewer_error": (fewer.var(correction=0) / max(1, len(fewer) - 1)).sqrt().item(),
    }


def unigram_entropy(tokens: Tensor) -> float:
    """Return the entropy of the frequencies of the tokens, in bits."""
    frequencies = tokens.flatten().bincount().double() / tokens.numel()
    return -(frequencies * frequencies.clamp_min(1e-300).log2()).sum().item()


@torch.no_grad()
def bits_per_character(judge: InferenceModel, tokens: Tensor) -> float:
    """Return the mean of -log2 p of each character after the first, given the characters before it, under an autoregressive model."""
    from w1train.training.forward import run_micro_batches

    num_texts, length = tokens.shape
    positions = torch.arange(length, dtype=torch.int32).expand(num_texts, length)
    batch = PackedBatch(tokens, torch.zeros_like(positions), positions.contiguous(), torch.arange(num_texts))
    noisy = corrupt_at(batch, judge.config.diffusion, _SEED, 1.0, draw=1)
    metrics, _ = run_micro_batches(judge.config, list(judge.predict.chunks), iter([noisy]), 1, training=False)
    return metrics["elbo"] / math.log(2)


def corrected(model: InferenceModel, reviser: str, noise: DiffusionConfig, tokens: Tensor) -> Tensor:
    """Return the texts after a revision, int64 [b, l].

    Args:
        noise: the noise that the texts are assumed to have.
    """
    from w1train.sampling.denoise import revise

    sampling = dataclasses.replace(model.config.sampling, reviser=reviser)
    if reviser == "self_correction":
        # A text gets one change for each wrong character: this rule does not end by itself where the text is right.
        sampling = dataclasses.replace(sampling, correction_steps=round(SHARE * tokens.shape[1]))
    prompts: list[list[int]] = [[] for _ in tokens]
    revised = revise(
        model.predict,
        prompts,
        tokens.tolist(),
        sampling,
        diffusion=noise,
        device=model.device,
        vocab_size=NUM_TEXT_IDS,
    )
    return torch.tensor(revised.texts)


def detection(model: InferenceModel, texts: Corrupted) -> dict[str, float]:
    """Return how well two scores find the wrong characters, each as the area under its ROC curve. The scores are how improbable the present
    character is given the others, and how probable the most probable other character is."""
    timesteps = torch.full((len(texts.tokens),), model.config.sampling.correction_timestep)
    logits = model.predict(texts.tokens, timesteps)[:, :, :NUM_TEXT_IDS].double().log_softmax(dim=2)
    present = texts.tokens[:, :, None]
    others = logits.scatter(2, present, -torch.inf).amax(dim=2)
    scores = {"present": -logits.gather(2, present)[:, :, 0], "new": others}
    return {name: area_under_curve(score, texts.is_wrong) for name, score in scores.items()}


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Return the area under the ROC curve, the probability that a score of label True is higher than a score of label False. No two scores
    may be equal."""
    ranks = scores.flatten().argsort().argsort().double() + 1
    labels = labels.flatten()
    num_true, num_false = int(labels.sum()), int((~labels).sum())
    return (ranks[labels].sum().item() - num_true * (num_true + 1) / 2) / (num_true * num_false)


def _quality(judge: InferenceModel, tokens: Tensor) -> dict[str, float]:
    return {"bits_per_character": bits_per_character(judge, tokens), "entropy": unigram_entropy(tokens)}


def compare(runs: Path, num_texts: int) -> dict[str, Any]:
    """Let each model correct the same texts, and return what ``correction.json`` has."""
    from w1train.inference.predictor import load_for_inference
    from w1train.runtime.distributed import distributed

    with distributed(ParallelConfig()) as ranks:
        judge = load_for_inference(runs / JUDGE, ranks=ranks)
        validation = judge.config.data.validation
        assert validation is not None, "the recipe has validation data"
        texts = corrupted(held_out_texts(validation, num_texts, judge.config.data.sequence_length))
        versions = {"the text": texts.original, "with wrong characters": texts.tokens}
        models = {name: load_for_inference(runs / name, ranks=ranks) for name in dict.fromkeys(each.run for each in CORRECTIONS)}
        noise = models[ASSUMED_NOISE].config.diffusion
        for each in CORRECTIONS:
            versions[f"corrected: {each.title}"] = corrected(models[each.run], each.reviser, noise, texts.tokens)
        return {
            "num_texts": len(texts.tokens),
            "length": texts.tokens.shape[1],
            "share": SHARE,
            "detection": {name: detection(model, texts) for name, model in models.items()},
            "texts": {title: {**repair(texts, tokens), **_quality(judge, tokens)} for title, tokens in versions.items()},
            "examples": [
                {title: judge.tokenizer.decode(tokens[row].tolist()) for title, tokens in versions.items()} for row in range(_NUM_EXAMPLES)
            ],
        }


@command("benchmarks.processes.correct")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input."""
    parser = ArgumentParser(prog="python -m benchmarks.processes.correct", description="Let models of make processes correct texts.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the directory of the run directories, such as runs/processes")
    parser.add_argument("--texts", type=int, default=48, metavar="N", help="number of texts (default: %(default)s)")
    options = parser.parse_args(arguments)
    import_megatron()
    from w1train.checkpoints.manifest import CheckpointError

    try:
        result = compare(options.runs, options.texts)
    except (UserError, FileNotFoundError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(options.runs / CORRECTION, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    for title, numbers in result["texts"].items():
        print(f"{title}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return 0


if __name__ == "__main__":
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())

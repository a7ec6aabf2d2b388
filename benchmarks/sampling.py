"""The benchmark of block-wise generation with cached keys and values, and of the same generation without a cache, on the CPU.

    python -m benchmarks.sampling --report
    python -m benchmarks.sampling diffusion.block_size=16 --lengths 128 256 --rows 4

Three ways denoise the same blocks in the same steps, greedily, with the same random weights:

- *cached*: ``BlockPredictor``. A step is a forward pass over one block. Each finished block costs one more pass.
- *uncached, so far*: a step is a forward pass over [x_t ; x_0] of the text up to the end of the current block, with the mask of training.
- *uncached, whole*: the same pass over the whole canvas with all masks, which is what a training step computes.

Without a cache, the mask of each length is made once and kept, and logits are computed only for the current block. The ways take turns, in
another order in each round, so that other work of the machine disturbs all of them equally, and their tokens are compared.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import logging
import shlex
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.common.results_page import Table, environment, spread, write_report
from w1train.config.argument_parser import ArgumentParser
from w1train.config.compose import load_config
from w1train.config.schema import Config, SamplingConfig
from w1train.runtime.megatron_on_cpu import import_megatron
from w1train.sampling.denoise import generate
from w1train.sampling.model_passes import BlockPredict

import_megatron()

from w1train.attention.attention_plan import AttentionPlan, plan_attention  # noqa: E402
from w1train.attention.visibility import block_diffusion_visibility  # noqa: E402
from w1train.engine.building import build_stage  # noqa: E402
from w1train.inference.predictor import BlockPredictor, Predictor  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.model.transformer import DiffusionTransformer, ModelInputs  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402


class TrainingMask:
    """Block-wise generation that keeps only tokens: each step is a pass over [x_t ; x_0]."""

    def __init__(self, config: Config, model: DiffusionTransformer, *, whole: bool) -> None:
        """Prepare generation over the whole canvas if ``whole`` is true, and otherwise over the text up to the current block's end."""
        assert config.diffusion.block_size is not None
        self.block_size: int = config.diffusion.block_size
        self._mask_token_id, self._model, self._whole = config.diffusion.mask_token_id, model, whole
        self._plans: dict[int, AttentionPlan] = {}

    def start(self, length: int, block_size: int) -> None:
        """Begin a new batch, whose rows have ``length`` tokens."""
        self._length, self._used_block_size, self._finished = length, block_size, torch.empty((1, 0), dtype=torch.int64)
        self._plans.clear()

    def append(self, tokens: Tensor) -> None:
        """Append finished blocks, int64 [b, n]."""
        self._finished = torch.cat([self._finished.expand(len(tokens), -1), tokens], dim=1)

    def select_rows(self, rows: Tensor) -> None:
        """Keep some of the rows."""
        self._finished = self._finished[rows]

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Return logits [b, w, v] for tokens, int64 [b, w], at timesteps, float32 [b]."""
        num_rows, width = tokens.shape
        first = self._finished.shape[1]
        canvas = torch.cat([self._finished.expand(num_rows, -1), tokens], dim=1)
        if self._whole:
            canvas = torch.nn.functional.pad(canvas, (0, self._length - canvas.shape[1]), value=self._mask_token_id)
        length = canvas.shape[1]
        position = torch.arange(length).repeat(2).expand(num_rows, -1)
        row = torch.arange(num_rows)[:, None]
        inputs = ModelInputs(
            # Rows whose logits are computed see neither other noisy blocks nor the clean copy of the current block.
            input_ids=torch.cat([canvas, canvas], dim=1),
            positions=position,
            attention_plan=self._plan(length),
            segment_timesteps=torch.cat([timesteps, torch.zeros(1)]),
            segment_index=torch.where(torch.arange(2 * length) < length, row, num_rows),
            logit_positions=(row * 2 * length + first + torch.arange(width)).flatten(),
        )
        return self._model(inputs).reshape(num_rows, width, -1)

    def _plan(self, length: int) -> AttentionPlan:
        if length not in self._plans:
            documents = torch.zeros((1, length), dtype=torch.int32)
            self._plans[length] = plan_attention(block_diffusion_visibility(documents, self._used_block_size, "document"))
        return self._plans[length]


def benchmark_config(overrides: Sequence[str], longest: int) -> Config:
    """Return the recipe's configuration as a model of block diffusion, without data."""
    length = -(-longest // 1024) * 1024  # that usual block sizes divide
    fixed = ["data.train=none", "data.tokenizer=none", "data.validation=null", f"data.sequence_length={length}"]
    fixed += [f"model.max_sequence_length={length}", "diffusion.block_size=32", "training.precision=fp32"]
    return load_config(["recipe=demo", *fixed, *overrides])


def build_model(config: Config) -> DiffusionTransformer:
    """Return a model with random weights and open gates. At initialisation, layers are the identity, and tokens would not depend on
    others."""
    model = build_stage(config, transformer_config(config.model, config.parallel, config.training.precision)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def measure(config: Config, options: argparse.Namespace) -> tuple[Table, float]:
    """Return tokens per second by length of the completion, and the share of tokens on which all ways agree."""
    model = build_model(config)
    ways: dict[str, BlockPredict] = {
        "cached": BlockPredictor(Predictor(config, [model])),
        "uncached, so far": TrainingMask(config, model, whole=False),
        "uncached, whole": TrainingMask(config, model, whole=True),
    }
    rows, agreements = [], []
    for length in options.lengths:
        seconds, tokens = _take_turns(ways, config, options, length)
        speeds = {name: [options.rows * length / second for second in times] for name, times in seconds.items()}
        cached = statistics.median(speeds["cached"])
        gains = [f"{cached / statistics.median(speeds[name]):.1f}" for name in list(ways)[1:]]
        rows.append((str(length), *(spread(speeds[name], "{:.0f}") for name in ways), *gains))
        agreements.append(torch.stack([tokens["cached"] == tokens[name] for name in list(ways)[1:]]).double().mean().item())
    columns = ("tokens generated", *ways, "cached / so far", "cached / whole")
    return Table("Tokens a second: median (quartiles)", columns, rows), statistics.mean(agreements)


def _take_turns(
    ways: dict[str, BlockPredict], config: Config, options: argparse.Namespace, length: int
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Return the seconds of each round by way, and the completions by way."""
    vocab_size = config.model.vocab_size
    prompts = torch.randint(vocab_size, (options.rows, options.prompt_length), generator=torch.Generator().manual_seed(1))
    prompts[prompts == config.diffusion.mask_token_id] += 1
    assert config.diffusion.block_size is not None
    num_steps = max(1, length * options.steps // config.diffusion.block_size)
    sampling = SamplingConfig(num_tokens=length, num_steps=num_steps)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {}
    names = list(ways)
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            # This EOS is not a token of the vocabulary, so that all ways generate the whole length.
            generation = generate(ways[name], prompts, sampling, diffusion=config.diffusion, eos_token_id=vocab_size, device="cpu")
            seconds[name].append(time.perf_counter() - started)
            tokens[name] = generation.completions
    return seconds, tokens


def _notes(config: Config, options: argparse.Namespace, agreement: float) -> str:
    model = config.model
    return f"""\
{options.rows} row(s) at once, prompts of {options.prompt_length} random tokens, blocks of {config.diffusion.block_size} tokens in
{options.steps} steps each; {options.rounds} rounds, {options.threads} thread(s). The model has {model.num_layers} layers of width
{model.hidden_size}, {config.training.precision}, random weights.

*cached* is what `w1train sample` does for a block-diffusion run. *uncached, so far* computes [x_t ; x_0] of the text up to the
current block's end at each step with the mask of training, *uncached, whole* that of the whole canvas.
`benchmarks/sampling.py` says more.

Tokens that agree with the cached ones (greedy, fp32): {agreement:.2%}."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write benchmarks/results/YYYY-MM-DD-sampling.md. Return the exit status."""
    parser = ArgumentParser(prog="benchmarks.sampling", description="Measure generation with and without cached blocks.")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe (recipe=demo unless another recipe is given)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[128, 256, 512, 1024], help="numbers of tokens to generate (default: 128 to 1024)"
    )
    parser.add_argument("--prompt-length", type=int, default=16, help="tokens of the prompt (default: 16)")
    parser.add_argument("--rows", type=int, default=1, help="number of prompts completed at once (default: 1)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a block (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="times each way runs at each length (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(options.threads)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    config = benchmark_config(options.overrides, max(options.lengths) + options.prompt_length)
    with distributed(config.parallel), torch.no_grad():
        table, agreement = measure(config, options)
    table.print()
    print(f"tokens that agree with the cached ones: {agreement:.2%}")
    if options.report:
        tables = [table, environment(shlex.join(["python", "-m", "benchmarks.sampling", *arguments]))]
        path = write_report("sampling", "Generation with and without cached blocks", tables, _notes(config, options, agreement))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

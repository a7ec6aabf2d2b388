"""The command that generates text with a trained run.

    w1train sample RUN --prompt "def main" --temperature 0.7
    w1train sample RUN --prompt "def main(" --suffix "return 0"
    w1train sample RUN --revise "def mian():"

With --suffix, the text is filled in between the prompt and the suffix. With --revise, nothing is generated, and the given text is revised.
Options that are not given have the values of the run's sampling configuration.
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
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from w1train.config.argument_parser import ArgumentParser, number_in
from w1train.config.constraints import Range
from w1train.config.errors import UserError
from w1train.config.rules.sampling_rules import OWN_KERNELS, OWN_ORDERS
from w1train.config.schema import Config
from w1train.runtime.command import command, text_argument
from w1train.runtime.masking import mask, unmasked
from w1train.sampling.settings import with_given
from w1train.trained_model import load_trained, require_run

if TYPE_CHECKING:  # torch takes seconds to import, which --help and a wrong option should not wait for
    import torch
    from rich.console import Console

    from w1train.data.tokenizer import Tokenizer
    from w1train.sampling.model_passes import BlockPredict, Predict
    from w1train.sampling.text import TextSample


class InferenceModel(Protocol):
    """The attributes of w1train.inference.predictor.InferenceModel that this command uses."""

    @property
    def predict(self) -> Predict: ...

    @property
    def blocks(self) -> BlockPredict | None: ...

    @property
    def config(self) -> Config: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def step(self) -> int: ...


Load = Callable[[Path, int | str | None], InferenceModel]
"""A function of a run directory and a checkpoint (its step, its name, or None for the newest step) that returns the model."""


@command("w1train sample")
def main(arguments: Sequence[str] | None = None, load: Load | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 for bad input; the reason is on stderr."""
    args = _parse(arguments)
    # At INFO the sampler logs what it skips.
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("w1train.sampling").setLevel(logging.INFO)
    try:
        require_run(args.run)
        model = (load or _load_run)(args.run, args.checkpoint)
        config = replace(model.config, sampling=with_given(model.config.sampling, _given(args)))
        if args.steps is not None and config.sampling.threshold is not None:
            print("--steps is not used: with a threshold, steps run until each block is full", file=sys.stderr)
        samples, speed = _sample(model, config, args)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(_as_json(args, model, config, samples, speed)), file=unmasked(sys.stdout))
    else:
        from w1train.sampling.display import print_samples

        print_samples(_console(unmasked(sys.stdout)), samples)
        print(speed, file=sys.stderr)
    return 0


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of generating all samples."""

    num_tokens: int
    """Tokens of the texts. Tokens that are computed after an EOS do not count."""
    seconds: float
    tokens_per_second: float
    tokens_per_forward: float
    """Tokens per forward pass of a sample. Passes that encode finished blocks count too."""

    def __str__(self) -> str:
        return (
            f"{self.num_tokens} tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s, "
            f"{self.tokens_per_forward:.2f} tokens per forward pass"
        )


def _one_each(given: list[str], option: str, num: int, others: str) -> list[str]:
    """Return a text for each of ``num`` other texts. A single text stands for all."""
    if len(given) not in (1, num):
        raise UserError(f"there are {len(given)} texts with {option} for {num} {others}; give one for each, or one for all")
    return given if len(given) == num else given * num


def _sample(model: InferenceModel, config: Config, args: argparse.Namespace) -> tuple[list[TextSample], Speed]:
    from w1train.data.conversations.chat_prompts import chat_prompts_of
    from w1train.sampling.display import DenoisingView
    from w1train.sampling.text import revise_texts, sample_texts

    view = DenoisingView(_console(), model.tokenizer) if args.show_steps else None
    predict, chat = model.blocks or model.predict, chat_prompts_of(config, model.tokenizer)
    started = time.perf_counter()
    with view or nullcontext():
        if args.revise is None:
            prompts = config.sampling.prompts
            suffixes = None if args.suffix is None else _one_each(args.suffix, "--suffix", len(prompts), "prompts")
            samples = sample_texts(
                predict, model.tokenizer, prompts, config, device=model.device, chat=chat, suffixes=suffixes, on_step=view
            )
        else:
            prompts = _one_each(args.prompt or [""], "--prompt", len(args.revise), "texts with --revise")
            samples = revise_texts(predict, model.tokenizer, prompts, args.revise, config, device=model.device, chat=chat, on_step=view)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(sample.tokens) for sample in samples)
    num_passes = sum(sample.num_forward_passes for sample in samples)
    return samples, Speed(num_tokens, seconds, num_tokens / seconds, num_tokens / max(num_passes, 1))


def _load_run(run: Path, checkpoint: int | str | None) -> InferenceModel:
    model = load_trained(run, checkpoint)
    from w1train.inference.predictor import require_diffusion

    require_diffusion(model)
    return model


def _console(stream: TextIO | None = None) -> Console:
    """Return a console that does not colour the model's text."""
    from rich.console import Console

    return Console(highlight=False, file=stream)


def _given(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings of sampling on the command line, by the name of their field; None = not given."""
    return {
        "prompts": args.prompt,
        "chat_template": args.chat_template,
        "num_tokens": args.num_tokens,
        "num_steps": args.steps,
        "threshold": args.threshold,
        "block_size": args.block_size,
        "temperature": args.temperature,
        "remasking": args.remasking,
        "seed": args.seed,
        "kernel": args.kernel,
        "reviser": "self_correction" if args.self_correct else None,
    }


def _as_json(args: argparse.Namespace, model: InferenceModel, config: Config, samples: list[TextSample], speed: Speed) -> dict[str, object]:
    from w1train.sampling.kernels import kernel_name

    settings = {**asdict(config.sampling), "kernel": kernel_name(config.sampling, config.diffusion)}
    del settings["interval"], settings["prompts"]
    return {
        "run": mask(str(args.run)),
        "checkpoint": model.step if args.checkpoint is None else args.checkpoint,
        "sampling": settings,
        "samples": [asdict(sample) for sample in samples],
        "speed": asdict(speed),
    }


def _order(name: str) -> str:
    """Return the name of an order. The table of orders is read only for a name that does not come with w1train."""
    if name not in OWN_ORDERS:
        from w1train.sampling.rules import ORDERS

        _require_name(name, ORDERS)
    return name


def _kernel(name: str) -> str:
    """Return the name of a kernel, as ``_order`` that of an order."""
    if name not in OWN_KERNELS:
        from w1train.sampling.kernels import KERNELS

        _require_name(name, KERNELS)
    return name


def _require_name(name: str, valid: Collection[str]) -> None:
    if name not in valid:
        raise argparse.ArgumentTypeError(f"found: {name!r}; valid: {', '.join(valid)}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="w1train sample", description="Generate text with a trained run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/demo")
    prompt_help = "text that the model continues; repeat the option for several texts; an empty text = without a prompt"
    parser.add_argument("--prompt", action="append", type=text_argument, metavar="TEXT", help=prompt_help)
    chat_help = (
        "make each prompt the message of a user by this chat template, and generate the reply: a jinja file, a tokenizer_config.json, a "
        "directory of a Hugging Face model, or built_in; an empty text = continue the prompts"
    )
    parser.add_argument("--chat-template", type=text_argument, metavar="PATH", help=chat_help)
    suffix_help = (
        "text after the generated tokens, which are filled in between prompt and suffix; once for all prompts, or once for each prompt; "
        "not with block diffusion, where a block does not see later blocks"
    )
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--suffix", action="append", type=text_argument, metavar="TEXT", help=suffix_help)
    revise_help = (
        "revise this text in the place of generating, by conditional modes if the run names no other reviser; repeat the option for "
        "several texts; a --prompt comes before the text and does not change"
    )
    given.add_argument("--revise", action="append", type=text_argument, metavar="TEXT", help=revise_help)
    parser.add_argument("--num-tokens", type=number_in(int, Range(0)), metavar="N", help="tokens to generate after the prompt")
    parser.add_argument("--steps", type=number_in(int, Range(1)), metavar="N", help="number of denoising steps of all blocks together")
    parser.add_argument(
        "--threshold",
        type=number_in(float, Range(0, 1)),
        metavar="P",
        help="unmask tokens that are more probable than P at each step; 0 = use --steps",
    )
    block_help = (
        "tokens of a block; blocks are denoised from left to right; 0 = as trained (block diffusion) or one block (masked diffusion)"
    )
    parser.add_argument("--block-size", type=number_in(int, Range(0)), metavar="N", help=block_help)
    temperature_help = "sampling temperature; 0 = the most probable token"
    parser.add_argument("--temperature", type=number_in(float, Range(0)), metavar="T", help=temperature_help)
    order_help = f"which predictions are kept at each step: {', '.join(OWN_ORDERS)}, or an order of your own"
    parser.add_argument("--remasking", type=_order, metavar="ORDER", help=order_help)
    kernel_help = (
        f"the rule of a step: {', '.join(OWN_KERNELS)}, or a kernel of your own; without the option that of the run, which is usually "
        "unmask for masked diffusion, and else ancestral"
    )
    parser.add_argument("--kernel", type=_kernel, metavar="KERNEL", help=kernel_help)
    parser.add_argument("--self-correct", action="store_true", help="revise each text after its last step by GIDD's self-correction")
    parser.add_argument("--seed", type=number_in(int, Range(0)), metavar="N", help="seed of the noise")
    parser.add_checkpoint_option()
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--show-steps", action="store_true", help="draw the canvas at every denoising step")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())

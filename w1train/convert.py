"""Models from and to Hugging Face:

    python -m w1train.convert from-hf HF_DIR --output my_recipes/model/NAME.yaml
    python -m w1train.convert to-hf RUN_DIR OUT_DIR

The first writes a model section for a recipe; the weights come in with training.initial_weights=HF_DIR.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

import yaml

from w1train.config.errors import UserError
from w1train.config.schema import ModelConfig
from w1train.runtime.command import command, describe_error
from w1train.runtime.files import write_text

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# Written even where they are the default: a reader of the recipe looks for them.
_ALWAYS = ("num_query_groups", "kv_channels", "max_sequence_length", "rope_base", "norm_epsilon", "qk_norm", "qkv_bias", "tie_embeddings")


@command("w1train.convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 if something could not be read or written, or 2 for bad input."""
    args = _parse(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("w1train").setLevel(logging.INFO)
    try:
        return from_hugging_face(args) if args.command == "from-hf" else to_hugging_face(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return 1


def from_hugging_face(args: argparse.Namespace) -> int:
    """Print or write the model section of a recipe."""
    from w1train.conversion.families import model_from_config, read_config

    text = model_recipe(model_from_config(read_config(args.directory), str(args.directory)), args.directory)
    if args.output is None:
        print(text, end="")
        return 0
    if args.output.exists():
        raise UserError(f"{args.output} is there already: remove it, or choose another name")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, text)
    print(f"wrote {args.output}: choose it with --config-dir {args.output.parent.parent} model={args.output.stem}", file=sys.stderr)
    return 0


def model_recipe(model: ModelConfig, directory: Path) -> str:
    """The YAML of a file of the model group."""
    from w1train.model.flops import num_parameters

    lines = [
        f"# {num_parameters(model):,} parameters, from {directory} by w1train.convert.",
        f"# training.initial_weights={directory} brings the weights.",
        f"# A mask token of its own needs a row more: vocab_size {model.vocab_size + 1} or more (a multiple of parallel.tensor), and",
        f"# diffusion.mask_token_id={model.vocab_size}. An id below {model.vocab_size} is re-used, with its row.",
    ]
    if model.conditioning == "none":
        lines.append("# conditioning: adaln adds the timestep; with adaln_init: identity the function at the start is the same.")
    for field in fields(ModelConfig):
        value = getattr(model, field.name)
        if field.name in _ALWAYS or field.default is MISSING or value != field.default:
            lines.append(f"{field.name}: {yaml.safe_dump(value).removesuffix('\n').removesuffix('\n...')}")
    return "\n".join(lines) + "\n"


def to_hugging_face(args: argparse.Namespace) -> int:
    """Export a run's checkpoint. megatron-core is imported only here: seconds, which a mistyped command need not wait for."""
    if not (args.run / "config.yaml").is_file():
        raise UserError(f"{args.run} is not a run directory: it has no config.yaml")
    from w1train.runtime.megatron_on_cpu import import_megatron

    import_megatron()
    from w1train.checkpoints.checkpoint_names import step_path
    from w1train.checkpoints.manifest import CheckpointError, complete_steps
    from w1train.checkpoints.verification import verify_checkpoint
    from w1train.conversion.export import export
    from w1train.runtime.run_directory import RunDirectory

    steps = complete_steps(args.run / "checkpoints")
    if not steps or args.step not in (None, *steps):
        wanted = "complete checkpoint" if args.step is None else f"checkpoint of step {args.step}"
        raise UserError(f"{args.run} has no {wanted}; it has: {', '.join(map(str, steps)) or 'none'}")
    checkpoint = step_path(args.run / "checkpoints", steps[-1] if args.step is None else args.step)
    try:
        verify_checkpoint(checkpoint)
        exported = export(RunDirectory(args.run), checkpoint, args.output, args.format, args.max_shard_size)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    print(f"{checkpoint} -> {args.output}: {exported.model_type}, {exported.num_parameters:,} parameters, {len(exported.files)} files")
    return 0


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text.upper())
    if match is None or int(match.group(1)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 5GB")
    return int(match.group(1)) * _UNITS[match.group(2)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m w1train.convert", description="Models from and to Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True)
    incoming = commands.add_parser("from-hf", help="the model section of a recipe, from a Hugging Face directory (Llama, Qwen2, Qwen3)")
    incoming.add_argument("directory", type=Path, metavar="HF_DIR", help="directory with config.json")
    incoming.add_argument("--output", type=Path, metavar="FILE", help="where to write it, such as my_recipes/model/NAME.yaml; else printed")
    outgoing = commands.add_parser("to-hf", help="a run's checkpoint as a directory that transformers loads")
    outgoing.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/demo")
    outgoing.add_argument("output", type=Path, metavar="OUT_DIR", help="a directory that is not there yet, or empty")
    outgoing.add_argument("--step", type=int, metavar="N", help="step of the checkpoint; the newest if not given")
    outgoing.add_argument(
        "--format",
        choices=["w1", "stock", "llama", "qwen2", "qwen3"],
        default="w1",
        help="w1: a diffusion model with its own code, for AutoModel with trust_remote_code=True (default). stock: the class of "
        "transformers that has these weights, which attends causally; or that class by name",
    )
    outgoing.add_argument("--max-shard-size", type=_bytes, default=_bytes("5GB"), metavar="SIZE", help="of a safetensors file (5GB)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Deprecations inside the libraries are not the user's.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())

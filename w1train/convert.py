"""The command that converts models from and to Hugging Face.

    w1train convert from-hf HF_DIR --output my_recipes/model/NAME.yaml
    w1train convert to-hf RUN OUT_DIR
    w1train convert to-hf RUN OUT_DIR --checkpoint average
    w1train convert to-hf RUN OUT_DIR --adapters

``from-hf`` writes the model section of a recipe. A run with training.initial_weights=HF_DIR then starts from the weights.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import yaml

from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.config.schema import ModelConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.conversion.families import FAMILIES, STOCK, W1
from w1train.registered_names import require_registered_names
from w1train.runtime.command import command, describe_error
from w1train.runtime.files import write_text
from w1train.runtime.output_files import require_writable

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# Fields that are written even if they have their default, because a reader of the recipe looks for them.
_ALWAYS = ("num_query_groups", "kv_channels", "max_sequence_length", "rope_base", "norm_epsilon", "qk_norm", "qkv_bias", "tie_embeddings")


@command("w1train convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 1 if a file could not be read or written, 2 for bad input; the reason is on stderr."""
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
    """Print the model section of a recipe, or write it to ``args.output``. Return the exit status."""
    from w1train.conversion.families import model_from_config, read_config

    text = model_recipe(model_from_config(read_config(args.directory), str(args.directory)), args.directory)
    if args.output is None:
        print(text, end="")
        return 0
    require_writable([args.output], [args.directory / "config.json"], overwrite=None)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, text)
    print(f"wrote {args.output}: choose it with --config-dir {args.output.parent.parent} model={args.output.stem}", file=sys.stderr)
    return 0


def model_recipe(model: ModelConfig, directory: Path) -> str:
    """Return a model section as the YAML of a file of the recipes' model group."""
    from w1train.model.flops import num_parameters

    lines = [
        f"# {num_parameters(model):,} parameters, from {directory} by w1train convert.",
        f"# Set training.initial_weights={directory} to start from its weights.",
        f"# A mask token of its own needs one more row: set vocab_size to {model.vocab_size + 1} or more, a multiple of parallel.tensor,",
        f"# and diffusion.mask_token_id={model.vocab_size}. A mask token with a smaller id uses the row of this id.",
    ]
    if model.conditioning == "none":
        lines.append("# conditioning: adaln adds the timestep. With adaln_init: identity the model computes the same at the start.")
    for field in fields(ModelConfig):
        value = getattr(model, field.name)
        if isinstance(value, ExpertsConfig):
            if model.experts.num_experts:
                lines.append(yaml.safe_dump({field.name: asdict(value)}, sort_keys=False).rstrip())
        elif field.name in _ALWAYS or field.default is MISSING or value != field.default:
            lines.append(f"{field.name}: {yaml.safe_dump(value).removesuffix('\n').removesuffix('\n...')}")
    return "\n".join(lines) + "\n"


def to_hugging_face(args: argparse.Namespace) -> int:
    """Export a run's checkpoint. Return the exit status."""
    if not (args.run / "config.yaml").is_file():
        raise UserError(f"{args.run} is not a run directory: it has no config.yaml")
    # megatron-core takes seconds to import, which a mistyped command should not wait for.
    from w1train.runtime.megatron_on_cpu import import_megatron

    import_megatron()
    from w1train.checkpoints.averaging import find_checkpoint
    from w1train.checkpoints.manifest import CONFIG, CheckpointError
    from w1train.checkpoints.verification import read_config, verify_checkpoint
    from w1train.conversion.export import export
    from w1train.runtime.run_directory import RunDirectory

    try:
        checkpoint = find_checkpoint(args.run / "checkpoints", args.checkpoint)
        verify_checkpoint(checkpoint)
        require_registered_names(read_config(checkpoint), checkpoint / CONFIG)
        exported = export(RunDirectory(args.run), checkpoint, args.output, args.format, args.max_shard_size, args.part)
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
    parser = ArgumentParser(prog="w1train convert", description="Convert models from and to Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True)
    incoming = commands.add_parser("from-hf", help=f"write a recipe's model section for a Hugging Face model ({', '.join(FAMILIES)})")
    incoming.add_argument("directory", type=Path, metavar="HF_DIR", help="directory with config.json")
    incoming.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write, such as my_recipes/model/NAME.yaml (default: print it)"
    )
    outgoing = commands.add_parser("to-hf", help="write a run's checkpoint as a directory that transformers loads")
    outgoing.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/demo")
    outgoing.add_argument("output", type=Path, metavar="OUT_DIR", help="directory to write, which must be new or empty")
    outgoing.add_checkpoint_option()
    outgoing.add_argument(
        "--format",
        choices=[W1, STOCK, *FAMILIES],
        default=W1,
        help="w1 (default): a diffusion model with its own code, for AutoModel with trust_remote_code=True. stock: the class of "
        "transformers that has these weights; it attends causally. Others: such a class by its name",
    )
    outgoing.add_argument(
        "--max-shard-size", type=_bytes, default=_bytes("5GB"), metavar="SIZE", help="largest size of a safetensors file (default: 5GB)"
    )
    parts = outgoing.add_mutually_exclusive_group()
    parts.add_argument(
        "--adapters",
        dest="part",
        action="store_const",
        const="adapters",
        help="write the adapters alone, in the format of PEFT, for a base in --format (default: add them to the weights)",
    )
    parts.add_argument("--base", dest="part", action="store_const", const="base", help="write the weights without the run's adapters")
    outgoing.set_defaults(part="merged")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main())

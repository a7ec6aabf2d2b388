"""Tiny random models of transformers, their directories, and this project's model with their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers and safetensors: pip install -e '.[hf]'")
pytest.importorskip("safetensors")

from tests.distributed import run_distributed  # noqa: E402
from tests.parallel.layouts import whole_tensors, world_size  # noqa: E402
from tests.saving import save_now  # noqa: E402
from tests.tiny import tiny_config  # noqa: E402
from w1train.attention.visibility import causal_visibility  # noqa: E402
from w1train.checkpoints.manifest import Progress  # noqa: E402
from w1train.config.schema import Config  # noqa: E402
from w1train.config.serialization import config_to_yaml  # noqa: E402
from w1train.conversion.families import model_from_config, read_config  # noqa: E402
from w1train.conversion.initial_weights import InitialWeights  # noqa: E402
from w1train.engine.building import TrainedModel, build_trained_model  # noqa: E402
from w1train.inference import predictor as inference  # noqa: E402
from w1train.inference.predictor import Predictor  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402

# A progress bar leaves a thread, and this process could then fork no ranks.
transformers.utils.logging.disable_progress_bar()

VOCAB_SIZE = 96
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
# At the original length of 16, the four pairs of channels have all three kinds of frequencies: kept, interpolated and divided.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
UNSCALED = {"rope_type": "default"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 50.0, **LLAMA3}}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": {**UNSCALED, "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 12}),
}
LAYOUTS = [
    {},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
]
TOKENS = torch.arange(2 * 20).reshape(2, 20) * 7 % VOCAB_SIZE


def make(case: str, directory: Path, **changes: Any) -> Any:
    """Save a model of transformers in several shards; no two of its weights are equal, biases and norms included."""
    name, settings = CASES[case]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **settings, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return model


def causal_logits(model: Any) -> torch.Tensor:
    """Return logits, float32 [b, l, v]."""
    with torch.no_grad():
        return model(TOKENS).logits


def config_for(directory: Path, **sections: dict) -> Config:
    """Return a run that starts from a directory of transformers; ``sections`` replace parts of that model's section."""
    config = tiny_config(training={"initial_weights": str(directory)}, diffusion={"exclude_mask_logit": False})
    config.model = model_from_config(read_config(directory), str(directory))
    for section, values in sections.items():
        for name, value in values.items():
            assert hasattr(getattr(config, section), name)
            setattr(getattr(config, section), name, value)
    return config


def build(config: Config) -> TrainedModel:
    """Build the model as a new run does."""
    return build_trained_model(config, InitialWeights(config).load)


def on_ranks(function: Callable[..., Any], config: Config, *args: Any, data_parallel: int = 1) -> list[Any]:
    """Run ``function(config, *args)`` on every rank of the layout."""

    def inside(_rank: int, _size: int) -> Any:
        with distributed(config.parallel):
            return function(config, *args)

    return run_distributed(inside, world_size(config, data_parallel), process_group=False, timeout=60)


def logits(config: Config, model: TrainedModel, *, causal: bool, timesteps: float = 0.5) -> torch.Tensor:
    """Return the logits of TOKENS, float32 [b, l, v]."""
    if causal:
        # This changes only the forked rank.
        inference.document_visibility = causal_visibility
    predictor = Predictor(config, list(model.chunks))
    with predictor.evaluating():
        return predictor(TOKENS, torch.full((len(TOKENS),), timesteps))


def imported_logits(config: Config) -> torch.Tensor:
    """Import the weights, and run the model causally."""
    return logits(config, build(config), causal=True)


def imported_tensors(config: Config) -> dict[str, torch.Tensor]:
    """Import the weights, and return whole parameters under global names (on rank 0)."""
    return whole_tensors(build(config), lambda parameter: parameter.data)


def step_of_nothing(model: TrainedModel) -> None:
    """Run an optimizer step without gradients at rate 0: weights are copied back from the masters, and there is state to save."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.step()


def save_run(config: Config, model: TrainedModel, run: Path) -> None:
    """Write a run directory with one checkpoint of the model."""
    step_of_nothing(model)
    if torch.distributed.get_rank() == 0:
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(config_to_yaml(config))
    save_now(run / "checkpoints", model, Progress(step=1), config_to_yaml(config))


def import_and_save(config: Config, run: Path) -> None:
    save_run(config, build(config), run)

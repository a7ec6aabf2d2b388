"""The trained model as a function of tokens: for samples while training, and from a run directory.

Shapes: b = rows, l = tokens of a row, v = vocabulary.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from w1train.attention.plan import plan_attention
from w1train.attention.visibility import document_visibility
from w1train.config.schema import Config, ParallelConfig
from w1train.config.serialization import config_from_yaml
from w1train.data.tokenizer import Tokenizer
from w1train.model.megatron_config import transformer_config
from w1train.model.transformer import ModelInputs
from w1train.runtime.distributed import distributed
from w1train.training.averaging import find_checkpoint
from w1train.training.checkpoint import load_model_weights, read_progress
from w1train.training.setup import build_stage


class Predictor:
    """tokens [b, l], t [b] -> logits [b, l, v], under the layout the model was built in.

    Called on every rank of one model replica; each gets all logits.
    """

    def __init__(self, config: Config, chunks: list[Any]) -> None:
        self.config, self.chunks = config, chunks

    @torch.no_grad()
    def __call__(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """int64 [b, l] and float32 [b] -> float32 [b, l, v]."""
        parallel = self.config.parallel
        inputs = _inference_inputs(tokens, timesteps, multiple_of=parallel.tensor if parallel.sequence else 1)
        # The schedule of virtual stages works on groups of as many micro-batches as there are stages, so here on copies.
        batches = [inputs] * (parallel.pipeline if len(self.chunks) > 1 else 1)
        iterators = [iter(batches) for _ in self.chunks]
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(batches),
            # Every rank of a context-parallel group has whole rows here; the schedule divides by the group.
            seq_length=inputs.input_ids.shape[1] * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        shape = (*tokens.shape, self.config.model.vocab_size)
        if parallel_state.is_pipeline_last_stage():
            logits = gather_from_tensor_model_parallel_region(results[0]).float().reshape(shape)
        else:
            logits = torch.empty(shape, device=tokens.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return logits

    @staticmethod
    def _forward_step(inputs: Iterator[ModelInputs], model: torch.nn.Module) -> tuple[Tensor, Any]:
        return model(next(inputs)), lambda logits, non_loss_data: logits

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode inside, training mode again after it."""
        for chunk in self.chunks:
            chunk.eval()
        yield
        for chunk in self.chunks:
            chunk.train()


def _inference_inputs(tokens: Tensor, timesteps: Tensor, *, multiple_of: int) -> ModelInputs:
    """Each row is one document, all of it visible, padded at its end to a length that sequence-parallel ranks can share;
    logits are asked for at the b * l real positions."""
    num_rows, length = tokens.shape
    padded = length + -length % multiple_of
    positions = torch.arange(padded, device=tokens.device)
    real = (positions < length).expand(num_rows, padded)
    documents = torch.where(real, 0, -1).to(torch.int32)
    return ModelInputs(
        input_ids=torch.nn.functional.pad(tokens, (0, padded - length)),
        positions=positions.expand(num_rows, padded),
        attention_plan=plan_attention(document_visibility(documents)),
        segment_timesteps=timesteps.float(),
        segment_index=None,
        logit_positions=real.flatten().nonzero()[:, 0],
    )


@dataclass(slots=True, frozen=True)
class InferenceModel:
    """A run's model, ready to predict."""

    predict: Predictor
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    step: int
    checkpoint: Path


# Process groups of load_for_inference live until the process ends.
_open_groups = contextlib.ExitStack()
atexit.register(_open_groups.close)


def load_for_inference(run_dir: Path, checkpoint: int | str | None = None) -> InferenceModel:
    """The model of a run's checkpoint on this process alone, whatever layout it was trained in.

    Args:
        checkpoint: its step, or its name ("average": the newest average); None = the newest step.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise FileNotFoundError(f"{run_dir} is no run directory: {config_path} is missing")
    path = find_checkpoint(run_dir / "checkpoints", checkpoint)
    config = config_from_yaml(config_path)
    config.parallel = ParallelConfig()
    tokenizer = Tokenizer.load(config.data.tokenizer)
    ranks = _open_groups.enter_context(distributed(config.parallel))
    stage = build_stage(config, transformer_config(config.model, config.parallel, config.training.precision))
    load_model_weights(path, [stage])
    stage.eval()
    return InferenceModel(Predictor(config, [stage]), config, tokenizer, ranks.device, read_progress(path).step, path)

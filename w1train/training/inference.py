"""The trained model as a function of tokens: for samples while training, and from a run directory.

Shapes: b = rows of a batch, l = tokens of a row, n = tokens of one pass, v = vocabulary.
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

from w1train.attention.cache import Causality, KeyValueCache, cached_visibility
from w1train.attention.plan import AttentionPlan, plan_attention
from w1train.attention.visibility import document_visibility
from w1train.config.schema import Config, ParallelConfig
from w1train.config.serialization import config_from_yaml
from w1train.data.tokenizer import Tokenizer
from w1train.model.megatron_config import transformer_config
from w1train.model.transformer import ModelInputs
from w1train.runtime.distributed import distributed
from w1train.training.checkpoint import complete_steps, load_model_weights
from w1train.training.inputs import num_streams
from w1train.training.setup import build_stage


class Predictor:
    """tokens [b, l], t [b] -> logits [b, l, v], each row one document, all of it visible, under the layout the model was built in.

    Called on every rank of one model replica; each gets all logits.
    """

    def __init__(self, config: Config, chunks: list[Any]) -> None:
        self.config, self.chunks = config, chunks

    def __call__(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """int64 [b, l] and float32 [b] -> float32 [b, l, v]."""
        num_rows, length = tokens.shape
        padded = self.padded(length)
        documents = torch.where(torch.arange(padded, device=tokens.device) < length, 0, -1).to(torch.int32).expand(num_rows, padded)
        return self.forward(tokens, timesteps, plan_attention(document_visibility(documents))).reshape(num_rows, length, -1)

    def padded(self, length: int) -> int:
        """Rows of a pass over so many tokens: sequence-parallel ranks share them evenly."""
        multiple = self.config.parallel.tensor if self.config.parallel.sequence else 1
        return length + -length % multiple

    @torch.no_grad()
    def forward(
        self, tokens: Tensor, timesteps: Tensor, plan: AttentionPlan, *, first_position: int = 0, with_logits: bool = True
    ) -> Tensor:
        """One pass over consecutive tokens, int64 [b, l], of one document a row, with one t a row, float32 [b].

        Args:
            plan: for the padded rows; what it has of a cache is read and written.
            with_logits: False = for what the pass leaves in the cache alone.

        Returns:
            float32 [b * l, v], or [0, v].
        """
        parallel = self.config.parallel
        inputs = _inference_inputs(tokens, timesteps, plan, self.padded(tokens.shape[1]), first_position, with_logits=with_logits)
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
        shape = (len(inputs.logit_positions), self.config.model.vocab_size)
        if parallel_state.is_pipeline_last_stage():
            logits = gather_from_tensor_model_parallel_region(results[0]).float()
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


def _inference_inputs(
    tokens: Tensor, timesteps: Tensor, plan: AttentionPlan, padded: int, first_position: int, *, with_logits: bool
) -> ModelInputs:
    """Logits are asked for at the b * l real positions, or at none."""
    num_rows, length = tokens.shape
    row = torch.arange(padded, device=tokens.device)
    wanted = (row < length) & with_logits
    return ModelInputs(
        input_ids=torch.nn.functional.pad(tokens, (0, padded - length)),
        positions=(first_position + row).expand(num_rows, padded),
        attention_plan=plan,
        segment_timesteps=timesteps.float(),
        segment_index=None,
        logit_positions=wanted.expand(num_rows, padded).flatten().nonzero()[:, 0],
    )


class BlockPredictor:
    """A block-diffusion model one block at a time, with the keys and values of finished blocks kept.

    Gives what training's forward pass over [x_t ; x_0] gives for the same block: the finished blocks are the clean stream, at
    t = 0, and the block itself is the noisy stream's. Called on every rank of one model replica, as Predictor is.
    """

    def __init__(self, predictor: Predictor, *, clean: Causality = "block", noisy: Causality = "block") -> None:
        """clean, noisy: how far a token of the clean stream and of the noisy block sees inside its own block, as in training."""
        assert predictor.config.diffusion.block_size is not None
        self.block_size = predictor.config.diffusion.block_size
        self._predictor, self._clean, self._noisy = predictor, clean, noisy

    def start(self, length: int, block_size: int) -> None:
        """New rows of ``length`` tokens at most, in blocks counted from their start; nothing is kept of earlier ones."""
        # Behind the tokens there is room for the padding of the last pass.
        self._cache = KeyValueCache(length + self._predictor.padded(1))
        self._block_size = block_size

    def append(self, tokens: Tensor) -> None:
        """Finished blocks that follow those that came before: int64 [b, n], n a multiple of the block size."""
        assert tokens.shape[1] % self._block_size == 0, "a part of a block would be kept without what it sees of the rest"
        at_zero = torch.zeros(len(tokens), device=tokens.device)
        self._pass(tokens, at_zero, self._clean, with_logits=False)
        self._cache.keep(tokens.shape[1])

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """The block after the finished ones, int64 [b, n], and t, float32 [b] -> float32 [b, n, v]."""
        assert tokens.shape[1] <= self._block_size, "tokens of two blocks do not see each other as in one"
        return self._pass(tokens, timesteps, self._noisy, with_logits=True).reshape(*tokens.shape, -1)

    def select_rows(self, rows: Tensor) -> None:
        """Go on with some of the rows, int64 [new b]."""
        self._cache.select_samples(rows)

    def _pass(self, tokens: Tensor, timesteps: Tensor, causality: Causality, *, with_logits: bool) -> Tensor:
        first, length = self._cache.num_tokens, tokens.shape[1]
        num_rows = self._predictor.padded(length)
        visibility = cached_visibility(first, length, self._block_size, causality, num_rows=num_rows, device=tokens.device)
        plan = plan_attention(visibility, cache=self._cache)
        return self._predictor.forward(tokens, timesteps, plan, first_position=first, with_logits=with_logits)


def block_predictor(predictor: Predictor) -> BlockPredictor | None:
    """For a model trained by block diffusion; None for masked diffusion, where nothing can be kept."""
    return BlockPredictor(predictor) if num_streams(predictor.config) == 2 else None


@dataclass(slots=True, frozen=True)
class InferenceModel:
    """A run's model, ready to predict."""

    predict: Predictor
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    step: int

    @property
    def blocks(self) -> BlockPredictor | None:
        """For generation by blocks; None for masked diffusion."""
        return block_predictor(self.predict)


# Process groups of load_for_inference live until the process ends.
_open_groups = contextlib.ExitStack()
atexit.register(_open_groups.close)


def load_for_inference(run_dir: Path, step: int | None = None) -> InferenceModel:
    """The model of a run's checkpoint on this process alone, whatever layout it was trained in.

    Args:
        step: which checkpoint; None = the newest.

    Raises:
        FileNotFoundError: no such run or checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise FileNotFoundError(f"{run_dir} is no run directory: {config_path} is missing")
    steps = complete_steps(run_dir / "checkpoints")
    if not steps or (step is not None and step not in steps):
        wanted = "a complete checkpoint" if step is None else f"a checkpoint of step {step}"
        raise FileNotFoundError(f"{run_dir} has no {wanted}; it has: {', '.join(map(str, steps)) or 'none'}")
    config = config_from_yaml(config_path)
    config.parallel = ParallelConfig()
    tokenizer = Tokenizer.load(config.data.tokenizer)
    ranks = _open_groups.enter_context(distributed(config.parallel))
    stage = build_stage(config, transformer_config(config.model, config.parallel, config.training.precision))
    chosen = steps[-1] if step is None else step
    load_model_weights(run_dir / "checkpoints" / f"step_{chosen:010d}", [stage])
    stage.eval()
    return InferenceModel(Predictor(config, [stage]), config, tokenizer, ranks.device, chosen)

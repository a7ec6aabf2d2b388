"""A trained model as a function of tokens, for samples during training and for models from a run directory.

Shapes: b = rows of a batch, l = tokens of a row, n = tokens of one pass, v = vocabulary.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from w1train.attention.attention_plan import AttentionPlan, plan_attention
from w1train.attention.cache import Causality, KeyValueCache, cached_visibility
from w1train.attention.visibility import document_visibility
from w1train.checkpoints.averaging import find_checkpoint
from w1train.checkpoints.loading import load_model_weights
from w1train.checkpoints.manifest import read_progress
from w1train.checkpoints.stored_size import require_stored
from w1train.config.errors import UserError
from w1train.config.phases import stage_of_step
from w1train.config.schema import AttentionConfig, Config, KernelsConfig, ParallelConfig
from w1train.config.serialization import config_from_yaml
from w1train.config.stages import at_stage
from w1train.data.tokenizer import Tokenizer
from w1train.diffusion.processes import noise_process
from w1train.engine.building import build_stage
from w1train.engine.learned_rates import current_noise_rates
from w1train.engine.pipeline import run_schedule
from w1train.model.experts.block_pools import RoutingBlocks
from w1train.model.megatron_config import transformer_config
from w1train.model.transformer import ModelInputs
from w1train.objectives.description import num_streams
from w1train.runtime.distributed import Ranks, distributed
from w1train.runtime.pulse import beat
from w1train.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class Predictor:
    """A masked-diffusion model, as a function from tokens [b, l] and t [b] to logits [b, l, v], in the layout that the model was built in.

    Each row is one document, all of which is visible. Every rank of one model replica calls the predictor, and each rank gets all logits.
    If ranks share experts, every rank of the run calls the predictor with the same tokens, and gets the logits of the first replica.
    """

    def __init__(self, config: Config, chunks: list[Any]) -> None:
        self.config, self.chunks = config, chunks

    def __call__(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Return logits, float32 [b, l, v], from tokens, int64 [b, l], and timesteps, float32 [b]."""
        num_rows, length = tokens.shape
        padded = self.padded(length)
        documents = torch.where(torch.arange(padded, device=tokens.device) < length, 0, -1).to(torch.int32).expand(num_rows, padded)
        outputs = self.forward(tokens, timesteps, plan_attention(document_visibility(documents)), num_logits=length)
        return self.at_targets(tokens, outputs, 0)

    def noise_rates(self) -> Tensor | None:
        """Return the learned rates of noise, float32 [vocabulary]; None if the model learns none. Every rank of the replica calls this."""
        return current_noise_rates(self.chunks)

    def at_targets(self, tokens: Tensor, outputs: Tensor, first_position: int, output_before: Tensor | None = None) -> Tensor:
        """Return the logits of each token: the outputs at its own position, or with diffusion.shift at the position before it.

        Args:
            tokens: int64 [b, l], beginning at ``first_position`` of their texts.
            outputs: float32 [b, l, v].
            output_before: float32 [b, 1, v], at the position before the first token; None = the first token begins the text.
        """
        if not self.config.diffusion.shift:
            return outputs
        if output_before is None:
            assert first_position == 0
            if bool((tokens[:, 0] == self.config.diffusion.mask_token_id).any()):
                _say_that_nothing_predicts_the_first_token()
            output_before = outputs[:, :1]
        return torch.cat([output_before, outputs[:, :-1]], dim=1)

    def padded(self, length: int) -> int:
        """Return the number of rows in a pass over ``length`` tokens, which sequence-parallel ranks can divide evenly."""
        multiple = self.config.parallel.tensor if self.config.parallel.sequence else 1
        return length + -length % multiple

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        timesteps: Tensor,
        plan: AttentionPlan,
        *,
        num_logits: int,
        first_position: int = 0,
        block_size: int | None = None,
    ) -> Tensor:
        """Run one pass over consecutive tokens, int64 [b, l], of one document in each row, with one t for each row, float32 [b].

        Args:
            plan: the attention plan of the rows after padding. If it has a cache, the pass reads the cache and writes to it.
            num_logits: how many of the last positions have logits; 0 = the pass only writes to the cache.
            block_size: tokens that share a pool of experts, if the model has pools; None = those of diffusion.block_size.

        Returns:
            float32 [b, num_logits, v].
        """
        parallel = self.config.parallel
        beat()
        inputs = _inference_inputs(tokens, timesteps, plan, self.padded(tokens.shape[1]), first_position, num_logits)
        if self.config.model.experts.num_experts and self.config.model.experts.pool_per_block:
            inputs.routing_blocks = _routing_blocks(inputs.positions, tokens.shape[1], block_size or self.config.diffusion.block_size)
        # With virtual stages, the schedule takes as many micro-batches at a time as there are stages. It gets copies of the single
        # micro-batch.
        batches = [inputs] * (parallel.pipeline if len(self.chunks) > 1 else 1)
        iterators = [iter(batches) for _ in self.chunks]
        results = run_schedule(
            self._forward_step,
            self.chunks,
            iterators,
            num_micro_batches=len(batches),
            # The schedule divides this length by the size of the context-parallel group, but here every rank of the group has whole rows.
            sequence_length=inputs.input_ids.shape[1] * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        shape = (len(inputs.logit_positions), self.config.model.vocab_size)
        if parallel_state.is_pipeline_last_stage():
            logits = gather_from_tensor_model_parallel_region(results[0]).float().contiguous()
            self._take_first_ranks(logits)
        else:
            logits = torch.empty(shape, device=tokens.device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(logits, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return logits.reshape(len(tokens), num_logits, self.config.model.vocab_size)

    def _take_first_ranks(self, logits: Tensor) -> None:
        """Replace logits by those of the first rank of this pipeline stage, if ranks share experts. The logits of ranks that compute the
        same tokens may differ in their last bits. Their samplers would then take different tokens, later different numbers of passes, and
        a rank would wait forever for the rows of another rank."""
        if ranks_share_experts(self.config.parallel):
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            torch.distributed.broadcast(logits, group=group, group_src=0)

    @staticmethod
    def _forward_step(inputs: Iterator[ModelInputs], model: torch.nn.Module) -> tuple[Tensor, Any]:
        return model(next(inputs)), lambda logits, non_loss_data: logits

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode, and into training mode again at the end."""
        for chunk in self.chunks:
            chunk.eval()
        yield
        for chunk in self.chunks:
            chunk.train()


def ranks_share_experts(parallel: ParallelConfig) -> bool:
    """Tell whether a rank needs other ranks, maybe of other model replicas, for the tokens of its experts."""
    return parallel.expert * parallel.expert_tensor > 1


def _inference_inputs(
    tokens: Tensor, timesteps: Tensor, plan: AttentionPlan, padded: int, first_position: int, num_logits: int
) -> ModelInputs:
    """Return the inputs of a pass, which asks for logits at the last ``num_logits`` positions of each row that are not padding."""
    num_rows, length = tokens.shape
    row = torch.arange(padded, device=tokens.device)
    wanted = (row >= length - num_logits) & (row < length)
    return ModelInputs(
        input_ids=torch.nn.functional.pad(tokens, (0, padded - length)),
        positions=(first_position + row).expand(num_rows, padded),
        attention_plan=plan,
        segment_timesteps=timesteps.float(),
        segment_index=None,
        logit_positions=wanted.expand(num_rows, padded).flatten().nonzero()[:, 0],
    )


def _routing_blocks(positions: Tensor, length: int, block_size: int | None) -> RoutingBlocks:
    """Return the blocks of a pass: those of its first ``length`` tokens, and one of the padding after them in each row.

    Args:
        positions: int64 [b, n], from a multiple of the block size on.
    """
    assert block_size is not None, "pools of experts need blocks, as the rules of the configuration say"
    num_rows, padded = positions.shape
    row = torch.arange(padded, device=positions.device)
    block = torch.where(row < length, (positions - positions[:, :1]) // block_size, padded)
    return RoutingBlocks(block + (padded + 1) * torch.arange(num_rows, device=positions.device)[:, None], num_rows * (padded + 1))


@cache
def _say_that_nothing_predicts_the_first_token() -> None:
    logger.warning(
        "with diffusion.shift no output is trained to predict the first token of a text: without a prompt, this token is taken from the "
        "output at its own position, as Dream does"
    )


class BlockPredictor:
    """A block-diffusion model, as a function of one block at a time that keeps the keys and values of finished blocks.

    Its logits are those of training's forward pass over [x_t ; x_0] for the same block: the finished blocks are the clean stream, at
    t = 0, and the block itself is the noisy stream. The same ranks call it as call Predictor.
    """

    def __init__(self, predictor: Predictor) -> None:
        diffusion = predictor.config.diffusion
        assert diffusion.block_size is not None
        self.block_size = diffusion.block_size
        self._predictor, self._shift = predictor, diffusion.shift
        self._clean: Causality = "token" if diffusion.clean_attention == "token_causal" else "block"
        self._noisy: Causality = "token" if diffusion.noisy_attention == "causal" else "block"

    def noise_rates(self) -> Tensor | None:
        """Return Predictor.noise_rates."""
        return self._predictor.noise_rates()

    def start(self, length: int, block_size: int) -> None:
        """Start new rows of at most ``length`` tokens, in blocks counted from their start. Keys and values of earlier rows are dropped."""
        self._cache = KeyValueCache(length + self._predictor.padded(1))
        self._block_size = block_size
        self._last_output: Tensor | None = None

    def append(self, tokens: Tensor) -> None:
        """Keep the next finished blocks, int64 [b, n], where n is a multiple of the block size."""
        assert tokens.shape[1] % self._block_size == 0, "a part of a block would be kept without what it sees of the rest"
        at_zero = torch.zeros(len(tokens), device=tokens.device)
        # With a token shift, the last output of this block predicts the first token of the next block. In training this is an output of the
        # noisy stream, of a block without masks. The keys and values that are kept are the clean stream's, which may see less of its block.
        as_noisy = self._shift and self._clean != self._noisy
        if as_noisy and tokens.shape[1] > self._block_size:
            self._keep(tokens[:, : -self._block_size], at_zero)
            tokens = tokens[:, -self._block_size :]
        noisy_output = self._pass(tokens, at_zero, self._noisy, num_logits=1) if as_noisy else None
        clean_output = self._keep(tokens, at_zero)
        if self._shift:
            self._last_output = clean_output if noisy_output is None else noisy_output

    def _keep(self, tokens: Tensor, at_zero: Tensor) -> Tensor:
        output = self._pass(tokens, at_zero, self._clean, num_logits=1 if self._shift else 0)
        self._cache.keep(tokens.shape[1])
        return output

    def predict_block(self, tokens: Tensor, timesteps: Tensor) -> Tensor:
        """Return logits of the block after the finished blocks, float32 [b, n, v], from its tokens, int64 [b, n], and t, float32 [b]."""
        assert tokens.shape[1] <= self._block_size, "tokens of two blocks do not see each other as in one"
        outputs = self._pass(tokens, timesteps, self._noisy, num_logits=tokens.shape[1])
        return self._predictor.at_targets(tokens, outputs, self._cache.num_tokens, self._last_output)

    def select_rows(self, rows: Tensor) -> None:
        """Keep some of the rows, int64 [new b]; the others have ended."""
        self._cache.select_samples(rows)
        if self._last_output is not None:
            self._last_output = self._last_output[rows]

    def _pass(self, tokens: Tensor, timesteps: Tensor, causality: Causality, *, num_logits: int) -> Tensor:
        first, length = self._cache.num_tokens, tokens.shape[1]
        num_rows = self._predictor.padded(length)
        visibility = cached_visibility(first, length, self._block_size, causality, num_rows=num_rows, device=tokens.device)
        plan = plan_attention(visibility, cache=self._cache)
        return self._predictor.forward(tokens, timesteps, plan, num_logits=num_logits, first_position=first, block_size=self._block_size)


def block_predictor(predictor: Predictor) -> BlockPredictor | None:
    """Return the predictor of a block-diffusion model; None for masked diffusion, where no keys and values can be kept."""
    return BlockPredictor(predictor) if num_streams(predictor.config) == 2 else None


@dataclass(slots=True, frozen=True)
class InferenceModel:
    """The model of a run's checkpoint, with its configuration and tokenizer."""

    predict: Predictor
    config: Config
    tokenizer: Tokenizer
    device: torch.device
    step: int
    checkpoint: Path

    @property
    def blocks(self) -> BlockPredictor | None:
        """Return the predictor for generation by blocks; None for masked diffusion."""
        return block_predictor(self.predict)


def require_diffusion(model: InferenceModel) -> None:
    """Raise UserError for a model that was not trained to fill in masked text."""
    if noise_process(model.config.diffusion).is_causal:
        raise UserError(
            f"{model.checkpoint} is of an autoregressive stage, which has never seen a mask token: it can neither fill in text nor score "
            "it by filling in. Choose a checkpoint of a later stage (--checkpoint), or `w1train convert to-hf --format stock`"
        )


# Process groups of load_for_inference live until the process ends.
_open_groups = contextlib.ExitStack()
atexit.register(_open_groups.close)


def load_for_inference(run_dir: Path, checkpoint: int | str | None = None, ranks: Ranks | None = None) -> InferenceModel:
    """Load the model of a run's checkpoint on this process alone, whatever layout it was trained in.

    Args:
        checkpoint: its step, or its name ("average" is the newest average); None = the newest step.
        ranks: this process in a world of one rank, whose process groups are open; None = open groups that live until the process ends.

    Raises:
        FileNotFoundError: the run does not exist.
        UserError: the checkpoint does not exist.
        UserError: config.yaml or the tokenizer cannot be used, or config.yaml describes a larger model than the checkpoint has.
        CheckpointError: the checkpoint is damaged.
    """
    config_path = run_dir / "config.yaml"
    if not config_path.is_file():
        raise FileNotFoundError(f"{run_dir} is no run directory: {config_path} is missing")
    path = find_checkpoint(run_dir / "checkpoints", checkpoint)
    config = config_from_yaml(config_path)
    require_stored(path, config.model)
    config = at_stage(config, stage_of_step(config, read_progress(path).step))
    # This machine may not have the ranks and kernels of the machines that trained the model.
    config.parallel, config.attention, config.kernels = ParallelConfig(), AttentionConfig(), KernelsConfig()
    run = RunDirectory(run_dir)
    config.data.tokenizer = str(run.tokenizer)
    if config.sampling.chat_template is not None:
        config.sampling.chat_template = str(run.chat_template)
    tokenizer = Tokenizer.load(config.data.tokenizer)
    ranks = ranks or _open_groups.enter_context(distributed(config.parallel))
    megatron = transformer_config(config.model, config.parallel, config.training.precision, config.kernels, config.training.fp8)
    stage = build_stage(config, megatron)
    load_model_weights(path, [stage])
    stage.eval()
    return InferenceModel(Predictor(config, [stage]), config, tokenizer, ranks.device, read_progress(path).step, path)

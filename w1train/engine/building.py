"""The construction of the model and its optimizer: the model's stages are in megatron-core's data-parallel wrapper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.engine.buckets import bucket_size
from w1train.engine.expert_balance import ExpertBalance
from w1train.engine.gradient_hooks import GradientHooks
from w1train.engine.learned_rates import current_noise_rates
from w1train.engine.megatron_ranges import mark_megatron
from w1train.engine.optimizers import build_optimizer
from w1train.engine.rate_multipliers import freeze_and_mark
from w1train.model.initialization import Slice, initialize_parameters
from w1train.model.linears import require_transformer_engine
from w1train.model.megatron_config import transformer_config
from w1train.model.transformer import DiffusionTransformer
from w1train.objectives.description import num_streams
from w1train.runtime.ranges import kernel_group, step_part


@dataclass(slots=True)
class TrainedModel:
    """The model's stages on this rank, their optimizer, and the measurements around their gradients."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    config: TransformerConfig
    hooks: GradientHooks
    expert_balance: ExpertBalance

    @property
    def stages(self) -> list[DiffusionTransformer]:
        """The modules inside the data-parallel wrappers."""
        return [chunk.module for chunk in self.chunks]

    @step_part("optimizer")
    @kernel_group("optimizer")
    def zero_gradients(self) -> None:
        """Clear the gradients of the last step, and the counts of its experts' tokens."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.expert_balance.clear()

    @torch.no_grad()
    def gather_parameters(self) -> None:
        """Give every rank the parameters of the last optimizer step. Every rank must call this before anything except the next training
        step reads parameters. With parallel.overlap_param_gather, otherwise only a forward pass gathers them, module by module."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def noise_rates(self) -> Tensor | None:
        """Return ``current_noise_rates``, of the last optimizer step. Every rank calls this."""
        if self.stages[0].model.learns_noise_rates:
            self.gather_parameters()
        return current_noise_rates(self.chunks)

    @torch.no_grad()
    def largest_parameter(self) -> float:
        """Return the largest magnitude of a parameter over all ranks; infinity if a parameter is NaN or infinite. Every rank calls this."""
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        largest = torch.stack([torch.linalg.vector_norm(parameter, torch.inf, dtype=torch.float32) for parameter in parameters]).max()
        # A maximum over ranks may lose a NaN, but it keeps infinity.
        largest = torch.where(largest.isnan(), torch.inf, largest)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.item()


LoadWeights = Callable[[Sequence[torch.nn.Module]], None]
"""A function that writes the parameters of this rank's stages."""


def build_trained_model(config: Config, load: LoadWeights | None = None) -> TrainedModel:
    """Build model and optimizer for this rank, with random weights.

    Args:
        load: writes other weights over the random ones. It is called before the optimizer copies the weights to fp32 masters; weights
            that are written later would be undone by the first step.

    Raises:
        ConfigurationError, UserError: on every rank; the configuration asks for something that this model or machine does not have.
    """
    megatron = transformer_config(config.model, config.parallel, config.training.precision, config.kernels, config.training.fp8)
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.deterministic_mode = config.training.deterministic
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        check_for_nan_in_grad=False,
    )
    if config.parallel.tp_comm_overlap:
        initialize_tensor_overlap(config)
    stages = [build_stage(config, megatron, vp_stage) for vp_stage in range(config.parallel.virtual_pipeline)]
    if load is not None:
        load(stages)
    freeze_and_mark(stages, config.optimizer.rate_multipliers, config.adapters)
    chunks = [_data_parallel(megatron, ddp_config, stage) for stage in stages]
    if config.parallel.overlap_grad_reduce:
        # Only the last micro-batch's backward pass may send a bucket; the schedules run the other backward passes under no_sync.
        no_sync = [chunk.no_sync for chunk in chunks]
        megatron.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    mark_megatron()
    balance = ExpertBalance(config, stages)
    return TrainedModel(chunks, build_optimizer(config, chunks), megatron, GradientHooks(megatron, chunks), balance)


def _data_parallel(
    megatron: TransformerConfig, ddp_config: DistributedDataParallelConfig, stage: DiffusionTransformer
) -> DistributedDataParallel:
    """Wrap a stage in megatron-core's module that keeps gradients in one fp32 buffer and reduces them over data-parallel ranks."""
    layout = None
    size = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    overlaps = ddp_config.overlap_grad_reduce
    # The wrapper wants the size that is the same on all pipeline stages, and ignores it on the later stages.
    ddp_config.bucket_size = bucket_size(size, 0, overlap_grad_reduce=overlaps)
    if ddp_config.use_distributed_optimizer:
        parameters = [parameter for parameter in stage.parameters() if parameter.requires_grad]
        layout = DistributedOptimizer.compute_full_param_layout(
            parameters,
            bucket_size(size, parallel_state.get_pipeline_model_parallel_rank(), overlap_grad_reduce=overlaps),
            size,
            ddp_config,
            expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
        )
    return DistributedDataParallel(megatron, ddp_config, stage, full_param_layout=layout)


def flat_buffer_sizes(
    parameters: list[torch.nn.Parameter], bucket_size: int | None, num_shards: int, num_expert_shards: int
) -> dict[bool, int]:
    """Return the elements, padding included, of the buffers in which the distributed optimizer lays out gradients: under True of routed
    experts, and under False of all other parameters.

    Args:
        bucket_size: elements after which a bucket ends; None = one bucket.
        num_shards: the data- and context-parallel ranks that share a buffer.
        num_expert_shards: the data-parallel ranks of the experts, which share the buffer of these.
    """
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    layouts = DistributedOptimizer.compute_full_param_layout(
        parameters, bucket_size, num_shards, ddp_config, expert_data_parallel_world_size=num_expert_shards
    ).layouts
    return {kind.is_expert_parallel: buffer.bucket_indices[-1][1] for kind, buffer in layouts.items()}


def initialize_tensor_overlap(config: Config) -> None:
    """Make transformer-engine's buffers for tensor-parallel collectives that run while matrix products do.

    Raises:
        UserError: transformer-engine is not installed, or there is no GPU.
    """
    require_transformer_engine("parallel.tp_comm_overlap", "true", "false")
    if not torch.cuda.is_available():
        raise UserError("parallel.tp_comm_overlap is true, which needs NVLink between GPUs, and this machine has no GPU; set it to false")
    from transformer_engine.pytorch.module import base

    parallel, training = config.parallel, config.training
    positions = num_streams(config) * config.data.sequence_length * training.micro_batch_size // parallel.context
    mode = base.UserBufferQuantizationMode
    base.initialize_ub(
        shape=[positions, config.model.hidden_size],
        tp_size=parallel.tensor,
        quantization_modes=[mode.NONE if training.fp8 == "none" else mode.FP8],
        bootstrap_backend="nccl",
    )


def build_stage(config: Config, megatron: TransformerConfig, vp_stage: int = 0) -> DiffusionTransformer:
    """Build a pipeline stage of this rank (its ``vp_stage``-th chunk under virtual pipelining), with initial weights."""
    chunk = {"ignore_virtual": False, "vp_stage": vp_stage if config.parallel.virtual_pipeline > 1 else None}
    stage = DiffusionTransformer(
        megatron,
        config.model,
        mask_token_id=config.diffusion.mask_token_id if config.diffusion.exclude_mask_logit else None,
        adapters=config.adapters,
        loss_chunk_size=config.training.loss_chunk_size,
        pre_process=parallel_state.is_pipeline_first_stage(**chunk),
        post_process=parallel_state.is_pipeline_last_stage(**chunk),
        vp_stage=chunk["vp_stage"],
    )
    initialize_parameters(
        stage,
        config.model,
        config.training.seed,
        tensor=Slice(parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()),
        expert_tensor=Slice(parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()),
        first_expert=parallel_state.get_expert_model_parallel_rank() * config.model.experts.num_experts // config.parallel.expert,
    )
    return stage

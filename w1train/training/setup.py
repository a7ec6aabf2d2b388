"""Building what is trained: the model's stages in megatron-core's data-parallel wrapper, and the optimizer."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from w1train.config.schema import Config
from w1train.model.initialization import initialize_parameters
from w1train.model.megatron_config import transformer_config
from w1train.model.transformer import DiffusionTransformer
from w1train.training.adamw import AdamW

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class TrainedModel:
    """The stages of this rank and their optimizer."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    config: TransformerConfig

    @property
    def stages(self) -> list[DiffusionTransformer]:
        """The bare modules."""
        return [chunk.module for chunk in self.chunks]


def build_trained_model(config: Config) -> TrainedModel:
    """Model and optimizer for this rank, with initial weights."""
    megatron = transformer_config(config.model, config.parallel, config.training.precision)
    megatron.finalize_model_grads_func = finalize_model_grads
    megatron.deterministic_mode = config.training.deterministic
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    chunks = [DistributedDataParallel(megatron, ddp_config, build_stage(config, megatron))]
    return TrainedModel(chunks, build_optimizer(config, chunks), megatron)


def build_stage(config: Config, megatron: TransformerConfig) -> DiffusionTransformer:
    """The pipeline stage of this rank, with initial weights."""
    stage = DiffusionTransformer(
        megatron,
        config.model,
        mask_token_id=config.diffusion.mask_token_id if config.diffusion.exclude_mask_logit else None,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    initialize_parameters(
        stage,
        config.model,
        config.training.seed,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    return stage


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW on fp32 master weights; norms, biases and other vectors without weight decay."""
    if megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        # No transformer-engine and no apex here: give megatron-core an AdamW that its checkpoints can hold.
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        megatron_optimizer.Adam = AdamW
    settings = config.optimizer
    optimizer_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=0.0,  # set before every step, from the schedule
        min_lr=0.0,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad,
        bf16=config.training.precision == "bf16",
        params_dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = megatron_optimizer.get_megatron_optimizer(optimizer_config, chunks, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
    return optimizer

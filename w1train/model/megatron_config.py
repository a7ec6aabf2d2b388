"""The translation of this project's configuration into megatron-core's."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from w1train.config.schema import KernelsConfig, ModelConfig, ParallelConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.model.fusions import choose_expert_product, choose_fusions, describe_elementwise, fp8_settings

FP8 = Literal["none", "tensorwise", "blockwise"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parameter_device(config: TransformerConfig) -> torch.device | None:
    """Return where megatron-core's own layers put their weights: the GPU, or None, which is torch's default device (maybe meta)."""
    return None if config.use_cpu_initialization else torch.cuda.current_device()


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: str,
    kernels: KernelsConfig | None = None,
    fp8: FP8 = "none",
) -> TransformerConfig:
    """Return megatron-core's TransformerConfig for the model and layout. ``kernels`` None = the defaults.

    Raises:
        UserError: the configuration names a kernel or an FP8 recipe that this machine cannot run.
    """
    on_cuda = torch.cuda.is_available()
    kernels = kernels or KernelsConfig()
    fusions = choose_fusions(kernels, model, on_cuda=on_cuda)
    describe_elementwise(kernels, model.hidden_size, on_cuda=on_cuda)
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups or model.num_attention_heads,
        kv_channels=model.kv_channels or model.hidden_size // model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # initialize_parameters fills the weights, with the same values under every layout.
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        params_dtype=DTYPES[precision],
        pipeline_dtype=DTYPES[precision],
        bf16=precision == "bf16",
        **_layout(parallel),
        **(_experts(model, parallel) if model.experts.num_experts else {}),
        # The loss function returns a sum and a count. Gradients are divided by the count of the whole global batch.
        calculate_per_token_loss=True,
        tp_comm_overlap=parallel.tp_comm_overlap,
        **fp8_settings(fp8),
        bias_activation_fusion=fusions.swiglu,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fusions.gradient_accumulation,
        persist_layer_norm=False,
        apply_rope_fusion=fusions.rope,
        # No CUDA graphs are captured. megatron-core warns of its own default, which is another word for the empty list.
        cuda_graph_modules=[],
    )
    config.elementwise_kernels = kernels.elementwise
    if model.experts.num_experts:
        config.expert_product = choose_expert_product(kernels, model, parallel.expert_tensor, precision, on_cuda=on_cuda)
    # With this attribute AND param.pipeline_parallel, finalize_model_grads sums the timestep embedding's gradients over pipeline
    # stages. With the second alone (as in NeMo, DFM and Bridge) the stages' replicas drift apart.
    config.has_cond_embedder = model.conditioning == "adaln"
    return config


def _experts(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of megatron-core's TransformerConfig for a mixture of experts, in which no token is dropped."""
    experts: ExpertsConfig = model.experts
    has_groups = experts.num_groups > 1
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.num_active,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_layer_freq": has_experts(model),
        "moe_router_score_function": experts.score,
        # A softmax over the chosen logits is the softmax over all logits, divided by the sum of the chosen ones. With one expert it would
        # be 1 whatever the logit, and megatron-core refuses it.
        "moe_router_pre_softmax": experts.score == "softmax" and (not experts.normalize or experts.num_active == 1),
        "moe_router_topk_scaling_factor": experts.scale,
        "moe_router_num_groups": experts.num_groups if has_groups else None,
        "moe_router_group_topk": experts.num_active_groups if has_groups else None,
        "moe_router_dtype": "fp32" if experts.router_precision == "fp32" else None,
        # The router of this project adds the losses and moves the bias, with this project's denominators.
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": parallel.expert_dispatcher.replace("_", ""),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def has_experts(model: ModelConfig) -> list[int]:
    """Return for each layer of the whole model 1 if it has experts, else 0."""
    num_dense = model.experts.num_dense_layers if model.experts.num_experts else model.num_layers
    return [int(layer >= num_dense) for layer in range(model.num_layers)]


def _layout(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the fields of megatron-core's TransformerConfig that come from the layout over ranks, recomputation included."""
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        # Interleaved stages send in both directions at once. If they were batched, two messages between the same two ranks (PP 2)
        # could be taken for each other without an error. If they are sent one by one, in an order that both ranks know, they cannot be
        # confused.
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_stage,
        "account_for_embedding_in_pipeline_split": parallel.embedding_counts_as_layer,
        "account_for_loss_in_pipeline_split": parallel.head_counts_as_layer,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        "recompute_granularity": None if parallel.recompute == "none" else parallel.recompute,
        "recompute_method": "uniform" if parallel.recompute == "full" else None,
        "recompute_num_layers": parallel.recompute_num_layers if parallel.recompute == "full" else None,
        "recompute_modules": ["core_attn", *(["moe"] if parallel.recompute_experts else [])] if parallel.recompute == "selective" else None,
    }

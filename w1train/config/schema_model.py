"""The part of the configuration that says what the model is, and how its layers are computed and divided over ranks. ``schema.py`` has the
rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from w1train.config.constraints import Length, NonNegativeFloat, NonNegativeInteger, PositiveFloat, Range, Size


@dataclass(slots=True, kw_only=True)
class ExpertsConfig:
    """The experts of a mixture of experts: a router gives each token to some of them. No token is ever dropped, because a token that took
    the place of another would let the noisy stream and later documents into the clean tokens."""

    num_experts: Annotated[int, Range(0, 4096)] = 0
    """Routed experts E of a layer; 0 = a dense model, which ignores the other fields."""
    num_active: Size = 8
    """Routed experts k that compute a token."""
    ffn_hidden_size: Size = 512
    """Inner width of each routed expert's SwiGLU."""
    shared_ffn_hidden_size: NonNegativeInteger = 0
    """Inner width of the SwiGLU that computes every token beside the routed experts; 0 = no shared expert. Several shared experts are one
    expert with the sum of their widths."""
    num_dense_layers: NonNegativeInteger = 0
    """First layers that have model.ffn_hidden_size instead of experts."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """The function that makes scores of the router's logits: softmax over all experts (Qwen3-MoE), or a sigmoid of each (Ling, LLaDA2)."""
    normalize: bool = True
    """Divide the scores of a token's chosen experts by their sum. It is always done with a sigmoid; LLaDA-MoE does not do it. A single
    chosen expert keeps its score, which would otherwise be 1 and teach the router nothing."""
    scale: PositiveFloat = 1.0
    """Factor of the chosen experts' weights (2.5 in Ling)."""
    num_groups: Size = 1
    """Groups of E / num_groups experts, of which a token may only use the best num_active_groups: those with the largest sum of the scores
    of their best num_active / num_active_groups experts. 1 = no groups."""
    num_active_groups: Size = 1
    """Groups that a token may use."""
    has_bias: bool = False
    """A number for each expert is added to its score in the choice of experts, and not to its weight (arXiv 2408.15664). Training moves it
    (balance.bias_rate). It needs score=sigmoid."""
    router_precision: Literal["fp32", "model"] = "fp32"
    """The precision of the router's logits: fp32, or that of the model."""
    pool_per_block: NonNegativeInteger = 0
    """Experts that the tokens of one block of one stream may use together (LLaDA2.2): those with the largest maximum of score + bias over
    these tokens; 0 = each token chooses among all experts."""


@dataclass(slots=True, kw_only=True)
class BalanceConfig:
    """The balance of tokens over experts while a mixture of experts is trained. A dense model ignores it."""

    bias_rate: NonNegativeFloat = 1.0e-3
    """The step u by which the bias of model.experts.has_bias moves after each training step, towards experts with fewer tokens than the
    mean; 0 = the bias stays."""
    zero_mean: bool = False
    """Take the mean over experts off each move of the bias (Ling). The choice of experts is the same, but the bias does not drift."""
    auxiliary: NonNegativeFloat = 0.0
    """Coefficient of the loss that is smallest, 1, if the tokens of a sample use all experts alike (arXiv 2101.03961, equation 4). It
    counts the experts that the router has chosen. Samples have the weights that they have in the objective, and layers are added up."""
    router_z: NonNegativeFloat = 0.0
    """Coefficient of the squared logarithm of the router's softmax denominator, the mean over tokens (arXiv 2202.08906, equation 5).
    Samples and layers count as in auxiliary."""
    streams: Literal["both", "noisy"] = "both"
    """The streams of block diffusion whose tokens are counted for the bias and the two losses. Padding never counts."""


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The diffusion Transformer."""

    vocab_size: Annotated[int, Range(2, 1 << 24)]
    """Rows of the embedding and of the output head, special tokens included."""
    # Each layer costs milliseconds and memory before it has a weight, even in a plan; the deepest Transformers have a thousand layers.
    num_layers: Annotated[int, Range(1, 4096)]
    """Transformer layers."""
    hidden_size: Size
    """Width h of the residual stream."""
    num_attention_heads: Size
    """Query heads."""
    ffn_hidden_size: Size
    """Inner width of SwiGLU."""
    num_query_groups: Size | None = None
    """Key/value heads (grouped-query attention); null = as many as there are query heads."""
    kv_channels: Size | None = None
    """Channels of one head; null = hidden_size / num_attention_heads. W1 has 24 x 128 = 3,072 in 2,048."""
    max_sequence_length: Length = 4096
    """The largest number of positions of a document that the model is meant for; data.sequence_length may not exceed it."""
    rotary_channels: Size | None = None
    """Channels of a head that the rotary position embedding turns, counted from its first channel; null = all (64 of 128 in LLaDA2)."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """llama3: low frequencies are divided by rope_scaling_factor, high frequencies are kept, and frequencies between them are
    interpolated (Llama 3.1). none: all frequencies are kept."""
    rope_scaling_factor: Annotated[float, Range(1)] = 8.0
    """Divisor of the low frequencies under llama3."""
    rope_low_frequency_factor: PositiveFloat = 1.0
    """Under llama3, frequencies whose wavelength is above rope_original_length / rope_low_frequency_factor are divided."""
    rope_high_frequency_factor: PositiveFloat = 4.0
    """Under llama3, frequencies whose wavelength is below rope_original_length / rope_high_frequency_factor are kept."""
    rope_original_length: Length = 8192
    """The sequence length at which the model was trained before the scaling (llama3)."""
    norm_epsilon: PositiveFloat = 1.0e-6
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key before the rotary embedding (Qwen3)."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values (Qwen2, Qwen2.5)."""
    tie_embeddings: bool = False
    """The input embedding and the output head share one matrix."""
    conditioning: Literal["adaln", "none"] = "adaln"
    """adaln: the timestep modulates every layer (W1). none: no timestep input at all (LLaDA)."""
    condition_size: Size = 256
    """Width of the condition vector that the timestep MLP gives to adaLN."""
    timestep_frequency_size: Size = 256
    """Width of the sinusoidal embedding of the timestep; an even number."""
    timestep_scale: PositiveFloat = 1000.0
    """Factor of t, which is in [0, 1], before the sinusoidal embedding."""
    adaln_init: Literal["zero", "identity"] = "zero"
    """zero: gates start at 0, so that every layer starts as the identity. identity: gates start at 1, and shifts and scales at 0,
    so that every layer starts as if it had no adaLN."""
    learns_noise_rates: bool = False
    """true: the model has a rate of noise for each token of the vocabulary, which is learned with the weights (GenMD4). It is for
    diffusion.objective=learned_masked alone, which needs it. Its own learning rate is a factor under the pattern noise_rates.* of
    optimizer.rate_multipliers."""
    transformer_impl: Literal["local", "te"] = "local"
    """Linear layers of the Transformer: local = those of megatron-core, te = those of transformer-engine, which training.fp8 and
    parallel.tp_comm_overlap need. Parameters have the same names and shapes; checkpoints under te also hold FP8 states."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 num_layers)."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """Layout of the model over ranks. The number of data-parallel ranks is the world size divided by the product of the others."""

    tensor: Size = 1
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group (Megatron's SP)."""
    pipeline: Size = 1
    """Pipeline stages."""
    virtual_pipeline: Size = 1
    """Model chunks per pipeline stage (interleaved 1F1B): more chunks make the bubble smaller and need more communication."""
    num_layers_in_first_stage: Size | None = None
    """Layers of the first pipeline stage, which also has the embedding; null = as many as the other stages have."""
    num_layers_in_last_stage: Size | None = None
    """Layers of the last pipeline stage, which also has the head; null = as many as the other stages have."""
    embedding_counts_as_layer: bool = False
    """Split the pipeline as if the embedding were one more layer."""
    head_counts_as_layer: bool = False
    """Split the pipeline as if the output head were one more layer."""
    context: Size = 1
    """Context-parallel ranks: each owns a part of every sequence."""
    context_method: Literal["all_gather", "all_to_all"] = "all_gather"
    """all_gather: ranks gather keys and values (in block diffusion only those of the clean stream, if each block is inside a chunk).
    all_to_all: ranks exchange heads for positions (Ulysses); tensor * context must divide the number of key/value heads."""
    context_chunk_size: Length = 128
    """Consecutive positions that one context-parallel rank gets together. If it is a multiple of the block size, noisy keys stay on their
    rank."""
    expert: Size = 1
    """Expert-parallel ranks: each has E / expert of a layer's routed experts. They are taken from the ranks of data, context and (if
    parallel.expert_tensor is smaller than parallel.tensor) tensor parallelism, so that they need no ranks of their own."""
    expert_tensor: Size = 1
    """Tensor-parallel ranks that share each routed expert."""
    expert_dispatcher: Literal["all_to_all", "all_gather"] = "all_to_all"
    """The way of tokens to the ranks of their experts. all_to_all: each token is sent to its experts' ranks. all_gather: every rank
    gets all tokens, which is faster only for few ranks and many active experts."""
    distributed_optimizer: bool = True
    """Shard optimizer states and fp32 masters over data-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: selective = core attention only, full = every layer."""
    recompute_experts: bool = False
    """true: recompute=selective also computes the layers of experts twice, tokens' way to their experts and back included."""
    recompute_num_layers: Size = 1
    """Layers per recomputed group when recompute is full."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks bucket by bucket during the backward pass of the last micro-batch."""
    overlap_param_gather: bool = False
    """Gather updated parameters bucket by bucket during the next forward pass; needs distributed_optimizer and overlap_grad_reduce."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel collectives with the matrix products that use their results (transformer-engine's user buffers). It works
    only on CUDA, and needs parallel.sequence and model.transformer_impl=te."""


@dataclass(slots=True, kw_only=True)
class AttentionConfig:
    """The kernels of attention (docs/attention.md)."""

    backend: str = "auto"
    """The kernels that compute attention in training and validation: cudnn (interval kernels for Hopper and Blackwell), flex (torch's
    FlexAttention), te (transformer-engine), sdpa (torch's dense kernels; on the CPU by rectangles where that is faster), reference
    (explicit softmax in fp32). auto = the first of these backends that works on the device. A named backend that does not work is an error.
    The log says which backend was chosen, and why the others were not chosen. Generation always uses sdpa."""

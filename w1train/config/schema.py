"""The configuration: one tree of slotted dataclasses, the only truth about types, defaults and meanings.

Hydra recipes (``recipes/``) only select and override; ``w1train.config.compose`` turns the composed text into these
objects, and ``w1train.config.rules.validate`` checks the whole. The rest of the package sees nothing but these classes.
Those of how a run is operated (checkpoints, logging, health) are in ``schema_operation.py``.
A field without a default must be set by a recipe. The string under each field is its documentation
(``docs/configuration.md`` is written from it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from w1train.config.constraints import (
    Fraction,
    FractionBelowOne,
    Length,
    NonNegativeFloat,
    NonNegativeInteger,
    OptionalPath,
    PositiveFloat,
    PositiveFraction,
    PositiveInteger,
    Range,
    RequiredPath,
    Seconds,
    Seed,
    Size,
    Tokens,
)
from w1train.config.schema_operation import CheckpointConfig, HealthConfig, LoggingConfig, ProfilingConfig

DecayStyle = Literal["constant", "linear", "cosine", "one_minus_sqrt"]
LossWeight = Literal["inverse_t", "inverse_fraction", "constant", "one_minus_t"]
LossNormalizer = Literal["tokens", "masked_tokens"]
BackendName = Literal["cudnn", "flex", "te", "sdpa", "reference"]


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
    """Key/value heads (grouped-query attention); null = as many as query heads."""
    kv_channels: Size | None = None
    """Channels of one head; null = hidden_size / num_attention_heads. W1 has 24 x 128 = 3,072 in 2,048."""
    max_sequence_length: Length = 4096
    """Longest document position the model is meant for; data.sequence_length may not exceed it."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "llama3"] = "none"
    """llama3: low frequencies are divided by rope_scaling_factor, high ones kept, those between interpolated (Llama 3.1)."""
    rope_scaling_factor: Annotated[float, Range(1)] = 8.0
    """Divisor of the low frequencies under llama3."""
    rope_low_frequency_factor: PositiveFloat = 1.0
    """Under llama3, wavelengths above rope_original_length / this are divided wholly."""
    rope_high_frequency_factor: PositiveFloat = 4.0
    """Under llama3, wavelengths below rope_original_length / this are kept."""
    rope_original_length: Length = 8192
    """Sequence length that the model was trained at before the scaling, for llama3."""
    norm_epsilon: PositiveFloat = 1.0e-6
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on each head's query and key before the rotary embedding (Qwen3)."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values (Qwen2, Qwen2.5)."""
    tie_embeddings: bool = False
    """One matrix for input embedding and output head."""
    conditioning: Literal["adaln", "none"] = "adaln"
    """adaln: the timestep modulates every layer (W1). none: no timestep input at all (LLaDA)."""
    condition_size: Size = 256
    """Width of the condition vector that the timestep MLP gives to adaLN."""
    timestep_frequency_size: Size = 256
    """Width of the sinusoid of the timestep; even."""
    timestep_scale: PositiveFloat = 1000.0
    """The sinusoid sees t times this, t in [0, 1]."""
    adaln_init: Literal["zero", "identity"] = "zero"
    """zero: gates start at 0 (every layer starts as the identity). identity: gates start at 1, shift and scale at 0
    (the layer starts as if it had no adaLN)."""
    transformer_impl: Literal["local", "te"] = "local"
    """Linear layers of the Transformer: local = megatron-core's. te = transformer-engine's, which training.fp8 and
    parallel.tp_comm_overlap need. Parameters have the same names and shapes; transformer-engine's checkpoints have FP8 states besides."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get init_std / sqrt(2 num_layers)."""


@dataclass(slots=True, kw_only=True)
class CorpusConfig:
    """One corpus of a blend."""

    prefix: RequiredPath
    """Prefix of its dataset, as in data.train."""
    weight: NonNegativeFloat = 1.0
    """Its share of the samples, relative to the other corpora's weights; 0 = only in stages that give it a weight."""
    max_epochs: PositiveFloat | None = None
    """How often it may be read in the whole run (see data.at_max_epochs); null = as often as its weight asks for."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Where the tokens come from."""

    train: OptionalPath = None
    """Prefix of the training dataset: PREFIX.bin, PREFIX.idx and PREFIX.json as data_tools.tokenize writes them, or all of its shards
    PREFIX_00000.bin and so on; null with data.blend. A prefix such as s3://bucket/train is copied to data.cache_directory first."""
    blend: dict[str, CorpusConfig] = field(default_factory=dict)
    """Several corpora instead of data.train, by name."""
    at_max_epochs: Literal["error", "drop"] = "error"
    """When the schedule would read a corpus more often than its max_epochs. error: the run does not start. drop: the corpus is left out
    from there on, and the others take its place."""
    validation: OptionalPath = None
    """Prefix of the validation dataset; null = no validation. It may not be a training dataset."""
    validation_sets: dict[str, RequiredPath] = field(default_factory=dict)
    """Prefixes of further validation datasets by name, scored beside data.validation; their metrics end in /NAME."""
    tokenizer: RequiredPath
    """The tokenizer's file (tokenizer.json)."""
    sequence_length: Length
    """Tokens of one packed sample."""
    packing: Literal["cut", "best_fit"] = "cut"
    """cut: documents are concatenated and cut into samples (Megatron's). best_fit: no document is cut unless it is longer than a sample;
    the rest of each sample is padding. Built at the first start, or before by `python -m w1train.data.build_packing`."""
    align: Length = 1
    """With best_fit, documents begin at multiples of this inside their sample, such as the block size; what is between is padding."""
    packing_seed: Seed = 0
    """Which of several equally long documents best_fit puts where; runs with the same one share the packing."""
    long_documents: Literal["restart", "continue"] = "restart"
    """Positions of what is cut from a document's beginning: restart at 0 as if the text began there, or continue, below
    model.max_sequence_length."""
    eos: Literal["keep", "drop"] = "keep"
    """keep: a document ends with its EOS, which is learned like any token. drop: it is left out."""
    loader: Literal["torch", "dali"] = "torch"
    """What reads ahead of the step: this project's workers, or an NVIDIA DALI pipeline (the dali extra)."""
    workers: Literal["thread", "process"] = "thread"
    """What the workers of loader=torch are: processes do not share the interpreter with the training loop; threads start at once."""
    num_workers: Annotated[int, Range(0, 1024)] = 1
    """Workers that prepare batches ahead of the step; 0 = in the training thread, where a read that hangs is not noticed."""
    prefetch: Annotated[int, Range(1, 10_000)] = 4
    """Micro-batches kept ready by the workers."""
    read_timeout: Seconds = 300.0
    """Seconds after which a worker that gives no micro-batch stops the run with an error; loader=dali waits for ever."""
    cache_directory: OptionalPath = None
    """Local directory for datasets of object storage and for packings (null: these are beside their dataset); one for the ranks of a
    node, not one for each."""


@dataclass(slots=True, kw_only=True)
class DiffusionConfig:
    """Forward process and objective. A stage of the schedule may set any of these otherwise (schedule.stages.NAME.diffusion)."""

    objective: Literal["diffusion", "autoregressive"] = "diffusion"
    """diffusion: masked tokens are predicted. autoregressive: every token predicts the next one of its document from clean text
    under a causal mask; of the other fields only random_length_probability and exclude_mask_logit then have a meaning."""
    mask_token_id: NonNegativeInteger = 14
    """Vocabulary id of the mask token."""
    timestep_per: Literal["sequence", "document", "block"] = "sequence"
    """What shares one timestep t; block needs block_size."""
    t_min: Fraction = 1.0e-3
    """Smallest mask probability (LLaDA's eps): t = t_min + (t_max - t_min) u, u uniform in [0, 1)."""
    t_max: PositiveFraction = 1.0
    """Largest mask probability."""
    block_size: Length | None = None
    """Tokens denoised together, with clean earlier blocks as context (two streams, [x_t ; x_0]); null = masked diffusion of
    whole documents (one stream)."""
    block_index: Literal["document", "sample"] = "document"
    """Where blocks are counted from: the start of each document, or the start of the sample (LLaDA2.0 eq. 3)."""
    clean_attention: Literal["block_causal", "token_causal"] = "block_causal"
    """What a clean token sees in its own block: all of it (BD3-LM, LLaDA2.0, SDAR), or only what is before it, so that a finished
    block's keys and values are an autoregressive cache (Nemotron, I-DLM)."""
    noisy_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """What a noisy token sees in its own noisy block: all of it, or only what is before it (I-DLM)."""
    shift: bool = False
    """The output at a position predicts the next token of its document, as autoregressive models do (Dream, Fast-dLLM v2); the first
    token of a document then has nothing to predict it and is never masked. False: it predicts its own token (LLaDA, SDAR)."""
    complementary: bool = False
    """Samples come in pairs of the same text, masked at t and, where the first one is not, at 1 - t: each token is predicted once a
    pair (LLaDA2.0, Fast-dLLM v2). t is drawn up to 1 - t_min at most. Global batches are even, and hold half as many texts."""
    num_strata: Annotated[int, Range(1, 1 << 20)] = 64
    """u is stratified over each run of this many consecutive samples of the global order (a power of two),
    rotated at random; a global batch that is a multiple of it is stratified exactly."""
    attention_annealing: Literal["none", "extent", "random"] = "none"
    """From a causal mask to the whole document while ``annealing_tokens`` of the stage go by, for a model that was autoregressive; one
    stream only. extent: a token sees more and more of what is behind it. random: each pair behind is visible with growing
    probability (DiffuLLaMA; no intervals, so no fused kernels). Validation and samples see the whole document throughout."""
    annealing_tokens: NonNegativeInteger = 0
    """Length of the annealing, from the start of the stage."""
    mask_embedding_noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise on the embeddings of masked tokens while training: it keeps a mask token that an
    autoregressive model has never seen, of a norm near zero, from blowing up gradients (LLaDA2.0). Set it in the first stage alone."""
    weight: LossWeight = "inverse_t"
    """Weight of a masked token's cross-entropy: inverse_t = 1/t (the ELBO), inverse_fraction = tokens / masked tokens of its segment
    (MegaDLMs), constant = 1, one_minus_t = 1 - t."""
    normalizer: LossNormalizer = "tokens"
    """What the weighted sum over the global batch is divided by: all tokens that can be predicted, or the masked ones."""
    autoregressive_weight: NonNegativeFloat = 0.0
    """Adds this times the clean stream's next-token cross-entropies to the objective, before it is divided (Nemotron, I-DLM); needs
    two streams and clean_attention=token_causal. No token predicts one of another document."""
    exclude_mask_logit: bool = True
    """Take the mask token out of the softmax: the model never predicts it."""
    random_length_probability: Fraction = 0.01
    """Share of samples cut to a random length in [1, sequence_length] (LLaDA: 1 %)."""


@dataclass(slots=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over ranks; data parallelism takes what is left of the world."""

    tensor: Size = 1
    """Tensor-parallel ranks."""
    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group (Megatron's SP)."""
    pipeline: Size = 1
    """Pipeline stages."""
    virtual_pipeline: Size = 1
    """Model chunks per pipeline stage (interleaved 1F1B): a smaller bubble for more communication."""
    num_layers_in_first_stage: Size | None = None
    """Layers of the first pipeline stage, which also has the embedding; null = as many as the others."""
    num_layers_in_last_stage: Size | None = None
    """Layers of the last pipeline stage, which also has the head; null = as many as the others."""
    embedding_counts_as_layer: bool = False
    """Split the pipeline as if the embedding were one more layer."""
    head_counts_as_layer: bool = False
    """Split the pipeline as if the output head were one more layer."""
    context: Size = 1
    """Context-parallel ranks: each owns a part of every sequence."""
    context_method: Literal["all_gather", "all_to_all"] = "all_gather"
    """all_gather: keys and values travel (in block diffusion the clean stream's alone). all_to_all: heads are exchanged for
    positions (Ulysses); needs key/value heads divisible by tensor * context."""
    context_chunk_size: Length = 128
    """Positions dealt to context-parallel ranks together; a multiple of the block size keeps noisy keys at home."""
    distributed_optimizer: bool = True
    """Shard optimizer states and fp32 masters over data-parallel ranks."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: selective = core attention only, full = every layer."""
    recompute_num_layers: Size = 1
    """Layers per recomputed group when recompute is full."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks bucket by bucket while the backward pass of the last micro-batch goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters bucket by bucket during the next forward pass; needs distributed_optimizer and overlap_grad_reduce."""
    tp_comm_overlap: bool = False
    """Tensor-parallel collectives behind the matrix products they feed (transformer-engine's user buffers); CUDA alone, needs sequence
    and model.transformer_impl=te."""


@dataclass(slots=True, kw_only=True)
class AttentionConfig:
    """The kernels of attention (docs/attention.md)."""

    backend: Literal["auto", BackendName] = "auto"
    """Who computes attention in training and validation: cudnn (interval kernels for Hopper and Blackwell), flex (torch's
    FlexAttention), te (transformer-engine), sdpa (torch's dense kernels; on the CPU by rectangles where that is faster), reference
    (explicit softmax in fp32). auto = the first of these that can serve on the device; a named one that cannot is an error. The choice,
    and why others were passed over, is in the log. Generation always runs on sdpa."""


@dataclass(slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    beta1: FractionBelowOne = 0.9
    """Decay of the first moment."""
    beta2: FractionBelowOne = 0.95
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms, biases and other vectors have none."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    rate_multipliers: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Learning rates of some parameters as multiples of the schedule's, by patterns of their names, the first that fits:
    {"*.mlp.*": 0.1, "embedding.*": 0} in a recipe; 0 = frozen. Names are those of the whole model: embedding.word_embeddings.weight,
    decoder.layers.0.self_attention.linear_qkv.weight, ..."""


@dataclass(slots=True, kw_only=True)
class StageConfig:
    """One stage of the schedule: a stretch of tokens with its learning rate and, where they differ from the run's, its batch, its
    text and its objective. Stages of different block sizes are LLaDA2.0's road from autoregressive to diffusion."""

    tokens: Tokens
    """Length of the stage in tokens."""
    learning_rate: NonNegativeFloat
    """Learning rate at the stage's end; a constant stage has it throughout."""
    global_batch_size: Length | None = None
    """Sequences of one optimizer step in this stage (batch-size warmup); null = training.global_batch_size."""
    style: DecayStyle = "constant"
    """How the rate goes from the previous stage's end to this one's: constant (jump), linear, cosine, one_minus_sqrt."""
    rewarm_tokens: NonNegativeInteger = 0
    """The rate starts from 0 and is back on its curve after so many tokens of the stage; 0 = it goes on as it was."""
    diffusion: Annotated[dict[str, Any], DiffusionConfig] = field(default_factory=dict)
    """Fields of diffusion that this stage sets otherwise, such as {block_size: 4}."""
    train: OptionalPath = None
    """Prefix of the training dataset of this stage; null = data.train or data.blend. A dataset used by several stages is
    read on, not again."""
    blend: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weights of corpora of data.blend in this stage; those not named are left out. Empty = the weights that they have there."""


@dataclass(slots=True, kw_only=True)
class ScheduleConfig:
    """Warmup-Stable-Decay: any number of named stages, in order; the run ends when the last one does."""

    stages: dict[str, StageConfig]
    """The stages by name; the first starts from learning rate 0."""


@dataclass(slots=True, kw_only=True)
class TrainingConfig:
    """The run."""

    global_batch_size: Length
    """Sequences of one optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Size
    """Sequences of one forward and backward pass on one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: bf16 weights and activations, fp32 master weights and gradients."""
    seed: Seed = 1234
    """Seeds initial weights, data order and noise, each through its own stream."""
    initial_weights: OptionalPath = None
    """Where a new run takes its weights from: a Hugging Face directory (Llama, Qwen2 or Qwen3: config.json and *.safetensors), a run
    directory (its newest checkpoint) or one checkpoint; null = random. Not read on resume."""
    loss_chunk_size: Length | None = None
    """Positions whose logits exist at once while the loss is computed, by each of which the head is computed twice (a third more
    FLOPs in the head alone); null = all positions, once, with their probabilities kept in fp32."""
    fp8: Literal["none", "tensorwise", "blockwise"] = "none"
    """FP8 products in the layers' linears (head, embedding, attention and conditioning stay bf16): one scale a tensor (tensorwise), or
    one for 1 x 128 and 128 x 128 blocks (blockwise, Hopper). Needs bf16 and model.transformer_impl=te."""
    deterministic: bool = False
    """Deterministic kernels on CUDA (slower). CPU runs always are."""


@dataclass(slots=True, kw_only=True)
class KernelsConfig:
    """Which implementation computes what; the numbers agree to rounding. auto = the fastest that this machine has; the log says what was
    taken, and why not another."""

    elementwise: Literal["auto", "triton", "torch"] = "auto"
    """Modulated RMSNorm, gated residual, and the softmax of a chunked loss: this project's Triton kernels, or plain PyTorch."""
    rope: Literal["auto", "fused", "unfused"] = "auto"
    """Rotary embedding: fused = this project's Triton kernel, as libraries' take one angle a place and not one a token."""
    swiglu: Literal["auto", "fused", "unfused"] = "auto"
    """SwiGLU: fused = megatron-core's, through torch.compile."""
    gradient_accumulation: Literal["auto", "fused", "unfused"] = "auto"
    """Weight gradients added to the fp32 buffer inside the matrix product: apex's CUDA extension, or transformer-engine's linears."""
    adamw: Literal["auto", "te", "apex", "torch"] = "auto"
    """AdamW: transformer-engine's FusedAdam, apex's, or torch's fused kernel."""


@dataclass(slots=True, kw_only=True)
class ValidationConfig:
    """Validation with fixed noise at fixed timesteps."""

    interval: PositiveInteger = 1000
    """Steps between validations; one more runs before the first step and one after the last."""
    num_samples: PositiveInteger = 128
    """Validation samples, the first of the validation set; fewer if it is smaller."""
    timesteps: list[PositiveFraction] = field(default_factory=lambda: [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95])
    """Every sample is scored at each of these t (midpoints of equal bins: the mean is the ELBO's quadrature)."""
    block_sizes: list[Length] = field(default_factory=list)
    """Score the samples at these block sizes too, beside the present one; data.sequence_length stands for masked diffusion."""


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """Text generated while training, and the defaults of w1train.sample."""

    interval: NonNegativeInteger = 0
    """Steps between samples during training; 0 = never."""
    prompts: list[str] = field(default_factory=lambda: [""])
    """One sample is drawn from each."""
    num_tokens: Length = 128
    """Tokens generated after the prompt."""
    num_steps: Length = 64
    """Denoising steps, all blocks together; not used with a threshold."""
    threshold: PositiveFraction | None = None
    """Each step unmasks every token whose prediction is more probable than this, at least one, until the block is full
    (confidence-threshold parallel decoding); null = as many tokens a step as num_steps asks for."""
    block_size: Length | None = None
    """Tokens denoised together, left to right; null = diffusion.block_size for a model of block diffusion, all at once for one
    of masked diffusion (otherwise semi-autoregressive)."""
    temperature: NonNegativeFloat = 0.0
    """0 = greedy; otherwise Gumbel-max sampling at this temperature."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which predictions are kept at each step."""
    seed: NonNegativeInteger = 0
    """Seed of the sampler's noise."""


@dataclass(slots=True, kw_only=True)
class Config:
    """A run."""

    name: str
    """Name of the run; its directory is runs_dir/name."""
    runs_dir: RequiredPath = "runs"
    """Where run directories live."""
    model: ModelConfig
    data: DataConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig
    training: TrainingConfig
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

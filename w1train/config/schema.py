"""The configuration: one tree of slotted dataclasses, which alone defines types, defaults, ranges and meanings.

Hydra recipes (``recipes/``) only select and override; ``w1train.config.compose`` turns the composed text into these
objects, and ``w1train.config.rules.validate`` checks the whole. The rest of the package sees only these classes. The classes of the
model and its layout are in ``schema_model.py``, those of adapters and sampling are in ``schema_adapters.py`` and ``schema_sampling.py``,
and those for operating a run (checkpoints, logging, health) are in ``schema_operation.py``. A recipe must set each field without a
default. A field's type carries the range of its values (``constraints.py``), and the string under the field is its documentation:
``docs/configuration.md`` is written from both.
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
from w1train.config.schema_adapters import AdaptersConfig
from w1train.config.schema_model import AttentionConfig, BalanceConfig, ModelConfig, ParallelConfig
from w1train.config.schema_operation import CheckpointConfig, HealthConfig, LoggingConfig, ProfilingConfig
from w1train.config.schema_post_training import ReferenceConfig
from w1train.config.schema_sampling import SamplingConfig

DecayStyle = Literal["constant", "linear", "cosine", "one_minus_sqrt"]
LossWeight = Literal["inverse_t", "elbo", "inverse_fraction", "constant", "one_minus_t", "cart", "gidd_dynamic", "log_snr"]
LossNormalizer = Literal["tokens", "masked_tokens", "samples", "documents", "sum_per_sample", "positions"]


@dataclass(slots=True, kw_only=True)
class CorpusConfig:
    """One corpus of a blend."""

    prefix: RequiredPath
    """Prefix of the corpus's dataset, as in data.train."""
    weight: NonNegativeFloat = 1.0
    """Share of the samples that come from this corpus, relative to the other corpora's weights; 0 = the corpus is read only in stages
    that give it a weight."""
    max_epochs: PositiveFloat | None = None
    """How often the corpus may be read in the whole run (data.at_max_epochs says what happens then); null = as often as its weight
    demands."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Datasets, tokenizer, packing and loader."""

    train: OptionalPath = None
    """Prefix of the training dataset: PREFIX.bin, PREFIX.idx and PREFIX.json as data_tools.tokenize writes them, or all of its shards
    PREFIX_00000.bin and so on; null when data.blend names the corpora. Files of a prefix such as s3://bucket/train are first copied to
    data.cache_directory."""
    blend: dict[str, CorpusConfig] = field(default_factory=dict)
    """Several corpora by name, instead of data.train."""
    at_max_epochs: Literal["error", "drop"] = "error"
    """What happens when the schedule would read a corpus more often than its max_epochs. error: the run does not start. drop: the corpus
    is left out from then on, and the other corpora take its place."""
    validation: OptionalPath = None
    """Prefix of the validation dataset, which may not be a training dataset; null = no validation."""
    validation_sets: dict[str, RequiredPath] = field(default_factory=dict)
    """Prefixes of further validation datasets by name. They are scored together with data.validation, and their metrics end in /NAME."""
    tokenizer: RequiredPath
    """The tokenizer's file (tokenizer.json)."""
    sequence_length: Length
    """Tokens of one packed sample."""
    packing: Literal["cut", "best_fit", "separate"] = "cut"
    """cut: documents are concatenated and cut into samples (as Megatron does). best_fit: no document is cut unless it is longer than a
    sample, and the rest of each sample is padding. The first start builds the packing, or `w1train data build-packing`
    builds it before. separate: each document is a sample, and is not longer than a sample."""
    align: Length = 1
    """With best_fit, each document begins at a multiple of this number inside its sample (the block size, for example), after padding or
    fill."""
    fill: Literal["none", "block", "batch", "sample"] = "none"
    """EOS tokens after the end of a document, instead of padding. They are part of the document and are learned. none: there are no such
    tokens.
    block: to the next multiple of data.align (of best_fit), so that the last block of a reply is whole. With packing=separate also batch:
    to the longest document of each data.fill_group samples (LLaDA), and sample: to the end of the sample (dFactory). A document that does
    not end with an EOS that may be noised gets no fill."""
    fill_group: Length = 8
    """Samples of a group of fill=batch: consecutive samples of different texts, whatever the layout and batch size are."""
    packing_seed: Seed = 0
    """With best_fit, this seed decides which of several documents of equal length goes where; runs with the same seed share the packing."""
    long_documents: Literal["restart", "continue"] = "restart"
    """Positions in a later part of a document that was cut. restart: they begin at 0, as if the text began there. continue: they continue
    from the part before, and always stay below model.max_sequence_length."""
    eos: Literal["keep", "drop"] = "keep"
    """keep: a document ends with its EOS token, which is learned like any other token. drop: the EOS token is left out."""
    loader: Literal["torch", "dali"] = "torch"
    """What reads batches ahead of the step. torch: workers of this project. dali: an NVIDIA DALI pipeline (needs the extra dali)."""
    workers: Literal["thread", "process"] = "thread"
    """What the workers of loader=torch are. process: workers do not share the interpreter with the training loop. thread: workers start
    at once."""
    num_workers: Annotated[int, Range(0, 1024)] = 1
    """Workers that prepare batches ahead of the step; 0 = the training thread prepares them, and data.read_timeout does
    not apply."""
    prefetch: Annotated[int, Range(1, 10_000)] = 4
    """Micro-batches kept ready by the workers."""
    read_timeout: Seconds = 300.0
    """Seconds after which a worker that gives no micro-batch stops the run with an error; loader=dali waits without a limit."""
    cache_directory: OptionalPath = None
    """Local directory for copies of datasets from object storage and for packings; all ranks of a node share it. null = packings are in
    the directory of their dataset, or in the run directory if that directory is read-only."""


@dataclass(slots=True, kw_only=True)
class DiffusionConfig:
    """Forward process and objective. A stage of the schedule may set other values (schedule.stages.NAME.diffusion)."""

    objective: str = "diffusion"
    """The noise process (docs/processes.md). diffusion: masked diffusion, in which the model predicts masked tokens. autoregressive: every
    token predicts the next token of its document from clean text under a causal mask; of the other fields only random_length_probability,
    exclude_mask_logit and normalizer then have a meaning. uniform: noise puts any token in the place of a token. hybrid: masks and other
    tokens (GIDD). log_snr: a mixture of both that changes with the signal-to-noise ratio. per_id_masked: rare tokens are masked before
    frequent tokens (DiffusionBERT). learned_masked: the model learns how early each token is masked (GenMD4). edits: a share of the samples
    is edited instead of masked (Seed Diffusion). token_to_token: a fixed share of random tokens beside masks (LLaDA2.1)."""
    noise_schedule: str = "linear"
    """The growth with t of the probability that noise replaces a token: linear, cosine, polynomial, log_linear or geometric for masked and
    uniform noise (objective=diffusion, uniform), also gaussian_argmax (Duo) for uniform noise; the first four for token_to_token."""
    schedule_epsilon: Annotated[float, Range(0, 0.5, includes_maximum=False)] = 0.0
    """A small number epsilon. With linear, cosine and polynomial, alpha becomes (1 - 2 epsilon) alpha + epsilon (MD4: 1e-4). With
    log_linear, alpha is 1 - (1 - epsilon) t (SEDD and MDLM: 1e-3)."""
    schedule_power: Annotated[float, Range(1)] = 2.0
    """k of noise_schedule=polynomial: a token is replaced with probability t^k."""
    schedule_sigma_min: PositiveFloat = 1.0e-4
    """The value of -log alpha at t = 0 with noise_schedule=geometric (SEDD)."""
    schedule_sigma_max: PositiveFloat = 20.0
    """The value of -log alpha at t = 1 with noise_schedule=geometric (SEDD)."""
    schedule_gamma_min: Annotated[float, Range(-20, 20)] = -3.55
    """The negative log-SNR of the Gaussian noise at t = 0 with noise_schedule=gaussian_argmax (Duo)."""
    schedule_gamma_max: Annotated[float, Range(-20, 20)] = -1.85
    """The negative log-SNR at t = 1 with noise_schedule=gaussian_argmax, above schedule_gamma_min (Duo)."""
    uniform_share: Annotated[float, Range(0, 1, includes_minimum=False, includes_maximum=False)] = 0.1
    """Share of other tokens than the mask token in the noise. hybrid: the probability at t = 1/2 that noise puts another token in the place
    of a token (GIDD's p_u: 0.1 or 0.2). token_to_token: their share of the noised tokens (LLaDA2.1 does not publish it; 0.1 is our
    choice)."""
    hybrid_gamma: PositiveFloat = 1.0
    """Exponent gamma of hybrid noise, at most 2 (GIDD: 1)."""
    log_snr_slope: NonNegativeFloat = 1.0
    """a of objective=log_snr, at most 1: the share sigmoid(a lambda + b) of the noise is uniform, with lambda = log(alpha / (1 -
    alpha))."""
    log_snr_shift: Annotated[float, Range(-1000, 1000)] = 0.0
    """b of objective=log_snr: 1000 gives uniform noise, -1000 masks."""
    token_counts: OptionalPath = None
    """The file with the count of each id in the corpus, for objective=per_id_masked. `w1train data count-tokens` writes it."""
    spindle_scale: Fraction = 0.3
    """The factor lambda with which the information of a token changes its noise, for objective=per_id_masked (DiffusionBERT: 0.3); at most
    1/pi."""
    edited_share: Fraction = 0.2
    """The share of the samples that are edited instead of masked, for objective=edits (Seed Diffusion does not publish it: our choice)."""
    edit_rate: Fraction = 0.1
    """The probability at t = 1 that a token of an edited sample is deleted, preceded by a new token or substituted, for objective=edits.
    The three kinds are equally probable, and the probability is proportional to t (Seed Diffusion edits about 10 %; the rates of the three
    kinds are our choice)."""
    mask_token_id: NonNegativeInteger = 14
    """Vocabulary id of the mask token."""
    num_noise_ids: NonNegativeInteger = 0
    """Ids below this number can be put in the place of a token by noise that is not on the mask token alone. It must be set for such a
    process, usually to model.vocab_size."""
    prediction: Literal["leave_one_out", "full"] = "leave_one_out"
    """The condition of the model's distribution at a position. leave_one_out: the other positions alone. full: also the noised token at the
    position itself, which is what the cross-entropy of all tokens (loss_positions=all) teaches. Where all noise is on the mask token both
    are the same. The loss decides it (docs/objectives.md); samplers and bounds convert it."""
    timestep_per: Literal["sequence", "document", "block"] = "sequence"
    """The tokens that share one timestep t: a whole sample (sequence), a document or a block; block needs block_size."""
    t_min: Fraction = 1.0e-3
    """Smallest mask probability (LLaDA's eps): t = t_min + (t_max - t_min) u, u uniform in [0, 1)."""
    t_max: PositiveFraction = 1.0
    """Largest mask probability."""
    mask_count: Literal["random", "exact"] = "random"
    """random: each token of a segment is masked with the probability t. exact: of the N tokens of a segment that may be noised, exactly
    the t N tokens, rounded up, are masked, so that t is their share; for objective=diffusion with the linear schedule. The loss is
    unbiased in both, and varies less with exact (LLaDA's estimator of likelihoods, VRPO)."""
    num_timesteps: NonNegativeInteger = 0
    """Steps T of a process in discrete time: t is one of 1/T, 2/T, ..., 1 (D3PM). 0 = t is continuous."""
    block_size: Length | None = None
    """Tokens denoised together, with clean earlier blocks as context (two streams, [x_t ; x_0]); null = masked diffusion of
    whole documents (one stream)."""
    block_index: Literal["document", "sample"] = "document"
    """Where the count of blocks starts: at each document, or at the sample (LLaDA2.0 eq. 3). Generated text counts from its own start."""
    clean_attention: Literal["block_causal", "token_causal"] = "block_causal"
    """What a clean token sees in its own block. block_causal: the whole block (BD3-LM, LLaDA2.0, SDAR). token_causal: only tokens before
    it, so that a finished block's keys and values are an autoregressive cache (Nemotron, I-DLM)."""
    noisy_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """What a noisy token sees in its own noisy block. bidirectional: the whole block. causal: only tokens before it (I-DLM)."""
    shift: bool = False
    """true: the output at a position predicts the next token of its document, as in autoregressive models (Dream, Fast-dLLM v2); no
    output predicts the first token of a document, which is never masked. false: the output predicts its own token (LLaDA, SDAR)."""
    complementary: bool = False
    """Samples come in pairs of the same text. The first is masked at t, and the second, at 1 - t, masks exactly the tokens that the
    first does not mask, so that each token is predicted once in a pair (LLaDA2.0, Fast-dLLM v2). t is at
    most 1 - t_min, unless t_max is below 1 and the weight has a bound (constant, one_minus_t, inverse_fraction, cart): with t from 0.3 to
    0.8 the second sample is then at 0.7 to 0.2. Global batch sizes are even, and a batch holds half as many texts."""
    antithetic: bool = False
    """Samples come in pairs of the same text, as with complementary. The first is noised at the fraction u of the range of t, and the
    second at 1 - u, by noise of its own. Global batch sizes are even, and a batch holds half as many texts."""
    coupled_draws: bool = False
    """Samples come in pairs of the same text, as with complementary, at the same t and with noise of their own. The gradient of learned
    rates of noise compares the losses of both (objective=learned_masked, GenMD4). Micro-batches are even too."""
    num_strata: Annotated[int, Range(1, 1 << 20)] = 64
    """u is stratified over groups of this many consecutive samples of the global order, a power of two, with a random rotation for each
    group; a global batch that is a multiple of this number is stratified exactly."""
    attention_annealing: Literal["none", "extent", "random"] = "none"
    """For a model that was autoregressive: how the mask changes from causal to the whole document during the first annealing_tokens of
    the stage; for one stream only. extent: a token sees a growing number of the tokens that follow it. random: it sees each following
    token with a growing probability (DiffuLLaMA); such masks are not intervals, so fused kernels cannot compute them. Validation and
    samples always see the whole document."""
    annealing_tokens: NonNegativeInteger = 0
    """Length of the annealing in tokens, from the start of the stage."""
    mask_embedding_noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise on the embeddings of masked tokens during training. An autoregressive model has never seen
    the mask token, whose embedding has a norm near zero and would cause very large gradients without this noise (LLaDA2.0). Set it in the
    first stage only."""
    loss: str = "cross_entropy"
    """The number of each token that is trained (docs/objectives.md). cross_entropy: -log p(token). kl_is: the bound in continuous time, a
    KL divergence and an Itakura-Saito divergence (GIDD, UDLM). finite_kl: the bound of num_timesteps steps (D3PM). score_entropy: the
    bound of a model whose outputs are scores (SEDD). per_id: the bound of masks whose rate depends on the token (DiffusionBERT).
    reconstruction: -log p of the token given also the noised token at its own position."""
    loss_positions: Literal["auto", "noised", "changed", "all"] = "auto"
    """The tokens whose loss is trained. noised: those that noise has replaced, some of them perhaps by themselves. changed: those that
    differ after noise. all: every token that can be predicted, also those that noise has kept. auto: noised for the cross-entropy, and all
    tokens that the bound is made of for the other losses."""
    weight: LossWeight = "inverse_t"
    """Weight of a token's loss (docs/objectives.md). elbo: the weight that makes the loss the process's bound. inverse_t: another name of
    it, because this weight is 1/t in linear masked diffusion. inverse_fraction: tokens / noised tokens of its segment (MegaDLMs).
    constant: 1. one_minus_t: 1 - t. cart: by the distance to visible tokens (Dream). gidd_dynamic: the bound's weight in proportion to
    that of a token that noise has put there (GIDD). log_snr: the bound's weight for t uniform in the log of the signal-to-noise ratio
    (arXiv 2512.10858)."""
    weight_min: NonNegativeFloat = 0.0
    """Smallest weight: smaller weights are raised to it."""
    weight_max: PositiveFloat | None = None
    """Largest weight: larger weights are lowered to it; null = no limit, except in gidd_dynamic (2) and log_snr (1000), as published."""
    cart_probability: Annotated[float, Range(0.0, 1.0, includes_minimum=False, includes_maximum=False)] = 0.1
    """The parameter p of the geometric distribution in weight=cart: a visible token at the distance d adds p (1 - p)^(d - 1) / 2."""
    focal_gamma: NonNegativeFloat = 0.0
    """Exponent of the focal factor (1 - p(token))^gamma of each cross-entropy; 0 = no such factor."""
    label_smoothing: FractionBelowOne = 0.0
    """Share of a cross-entropy's target that is spread evenly over all ids that can be predicted."""
    cross_entropy_weight: NonNegativeFloat = 0.0
    """Factor lambda of the cross-entropies of all tokens that can be predicted, also of those that noise has kept, which are added to the
    weighted sum before it is divided (D3PM, DiffusionBERT)."""
    confidence_weight: NonNegativeFloat = 0.0
    """Factor beta of the mean entropy of the noised tokens that the model predicts correctly, which is added to the loss: the model becomes
    sure of more tokens at once, so that the sampler needs fewer steps (dParallel: 2; the confidence-aware training of LLaDA2.0). It needs
    loss=cross_entropy, and one more forward pass in each step, which counts the correct tokens of the whole batch."""
    confidence_temperature: PositiveFloat = 1.0
    """Temperature T of the softmax of this entropy (dParallel: 0.5)."""
    normalizer: LossNormalizer = "tokens"
    """The number by which the weighted sum over the global batch is divided. tokens: the number of all tokens that can be predicted.
    masked_tokens: the number of masked tokens. samples: each sample's sum is divided by the sample's own number of tokens that can be
    predicted, and the total by the number of samples. A sample that is cut short then weighs as much as a whole sample (LLaDA's algorithm
    1). documents: the same for documents, which is what samples means if each sample is one document. sum_per_sample: the number of
    samples. positions: the number of samples times data.sequence_length. Samples and documents without a token that can be predicted do
    not count."""
    autoregressive_weight: NonNegativeFloat = 0.0
    """Factor of the clean stream's next-token cross-entropies, which are added to the weighted sum before it is divided (Nemotron,
    I-DLM). A value above 0 needs two streams and clean_attention=token_causal. No token predicts a token of another document."""
    preference_draws: NonNegativeInteger = 0
    """Draws of noise n for each reply of a preference dataset, whose pairs of replies are then trained by DPO on their ELBOs (VRPO, LLaDA
    1.5: 8). Global batch sizes are multiples of 2n, and hold global_batch_size / 2n pairs (docs/preferences.md); 0 = no preferences."""
    preference_beta: PositiveFloat = 0.2
    """Factor beta of the difference to the reference in the loss of a pair, -log sigmoid(beta * difference) (LLaDA 1.5: 0.2). The
    difference is in nats of whole replies, not per token."""
    preference_cross_entropy_weight: NonNegativeFloat = 0.0
    """Factor of the chosen reply's negative ELBO per token, which is added to the loss of its pair (LLaDA 1.5: 0.05; which reply it trains
    is not published: our choice)."""
    exclude_mask_logit: bool = True
    """Leave the mask token out of the softmax, so that the model never predicts it."""
    random_length_probability: Fraction = 0.01
    """Share of samples that are cut to a random length in [1, sequence_length] (LLaDA: 1 %)."""

    @property
    def is_band_of_pairs(self) -> bool:
        """The answer whether the paired sample of a complementary pair may be at a t below t_min."""
        return self.complementary and self.t_max < 1 and self.weight in ("constant", "one_minus_t", "inverse_fraction", "cart")

    @property
    def samples_per_text(self) -> int:
        """Consecutive samples of the global order that have the same text: 2 for pairs, and all draws of a reply for preferences."""
        if self.preference_draws:
            return self.preference_draws
        return 2 if self.complementary or self.antithetic or self.coupled_draws else 1


@dataclass(slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer."""

    name: str = "adamw"
    """The name of the optimizer. adamw: arXiv 1711.05101. muon: the matrices of the layers have orthogonalized updates (arXiv 2502.16982),
    and everything else has AdamW's."""
    beta1: FractionBelowOne = 0.9
    """Decay of the first moment."""
    beta2: FractionBelowOne = 0.95
    """Decay of the second moment."""
    momentum: FractionBelowOne = 0.95
    """Muon: decay of the momentum, which is Nesterov's."""
    update_scale: Literal["moonlight", "original"] = "moonlight"
    """Muon: factor of an orthogonalized update of n outputs and m inputs. moonlight: 0.2 sqrt(max(n, m)), with which AdamW's learning rate
    and weight decay fit the matrices too. original: sqrt(max(1, n / m)), which wants a larger rate for the matrices than for the rest:
    set optimizer.rate_multipliers."""
    epsilon: PositiveFloat = 1.0e-8
    """A small number that is added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; it does not apply to norms, biases and other vectors."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 = no clipping."""
    rate_multipliers: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Factors of the schedule's learning rate by patterns of parameter names, such as {"*.mlp.*": 0.1, "embedding.*": 0} in a recipe.
    The first pattern that fits a parameter applies; 0 = the parameter is frozen. Names are those of the whole model:
    embedding.word_embeddings.weight, decoder.layers.0.self_attention.linear_qkv.weight, ..."""


@dataclass(slots=True, kw_only=True)
class StageConfig:
    """One stage of the schedule: a number of tokens with a learning rate and, where the stage differs from the run, its own batch size,
    datasets and objective. LLaDA2.0 converts an autoregressive model by stages of different block sizes."""

    tokens: Tokens
    """Length of the stage in tokens."""
    learning_rate: NonNegativeFloat
    """Learning rate at the end of the stage; a constant stage has this rate from its first step."""
    global_batch_size: Length | None = None
    """Samples of one optimizer step in this stage (batch-size warmup); null = training.global_batch_size."""
    style: DecayStyle = "constant"
    """How the learning rate changes from the end of the previous stage to the end of this stage: constant (at once), linear, cosine or
    one_minus_sqrt."""
    rewarm_tokens: NonNegativeInteger = 0
    """Tokens at the start of the stage during which the learning rate rises from 0 back to its curve; 0 = no second warmup."""
    diffusion: Annotated[dict[str, Any], DiffusionConfig] = field(default_factory=dict)
    """Fields of diffusion that have other values in this stage, such as {block_size: 4}."""
    train: OptionalPath = None
    """Prefix of the training dataset of this stage; null = data.train or data.blend. When several stages use one dataset, each stage
    continues to read where the stage before it stopped."""
    blend: dict[str, NonNegativeFloat] = field(default_factory=dict)
    """Weights of corpora of data.blend in this stage; corpora that are not named are left out. Empty = the weights in data.blend."""


@dataclass(slots=True, kw_only=True)
class ScheduleConfig:
    """Warmup-Stable-Decay: any number of named stages, in order. The run ends with the last stage."""

    stages: dict[str, StageConfig]
    """The stages by name. The first stage starts from learning rate 0."""


@dataclass(slots=True, kw_only=True)
class TrainingConfig:
    """Batch sizes, precision, seed and initial weights."""

    global_batch_size: Length
    """Samples of one optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Size
    """Samples of one forward and backward pass on one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: weights and activations are in bf16, master weights and gradients in fp32. fp32: everything is in fp32."""
    seed: Seed = 1234
    """Seed of the initial weights, the data order and the noise, each of which has its own stream of random numbers."""
    initial_weights: OptionalPath = None
    """Where a new run takes its weights from: a Hugging Face directory (Llama, Qwen2 or Qwen3: config.json and *.safetensors), a run
    directory (its newest checkpoint) or one checkpoint; null = random weights. A run that resumes does not read it."""
    loss_chunk_size: Length | None = None
    """Positions whose logits are in memory at once while the loss is computed. The head is then computed twice, which costs a third more
    FLOPs in the head only. null = all positions at once; the head is computed once, and the probabilities are kept in fp32."""
    fp8: Literal["none", "tensorwise", "blockwise"] = "none"
    """Matrix products in FP8 in the linear layers of the Transformer (head, embedding, attention and conditioning stay in bf16).
    tensorwise: each tensor has one scale. blockwise: each block of 1 x 128 or 128 x 128 has one scale (Hopper). Both need bf16 and
    model.transformer_impl=te."""
    deterministic: bool = False
    """Use deterministic kernels on CUDA, which are slower. Runs on the CPU are always deterministic."""


@dataclass(slots=True, kw_only=True)
class KernelsConfig:
    """Implementations of single operations, whose results agree up to rounding. auto = the fastest implementation on this machine;
    the log says which implementation was chosen, and why the others were not chosen."""

    elementwise: Literal["auto", "triton", "torch"] = "auto"
    """Modulated RMSNorm, gated residual, and the softmax of a chunked loss. triton: Triton kernels of this project. torch: plain
    PyTorch."""
    rope: Literal["auto", "fused", "unfused"] = "auto"
    """Rotary embedding. fused: a Triton kernel of this project; kernels of other libraries take one angle for each place of the sequence,
    not for each token. unfused: plain PyTorch."""
    swiglu: Literal["auto", "fused", "unfused"] = "auto"
    """SwiGLU. fused: megatron-core's function, through torch.compile. unfused: plain PyTorch."""
    gradient_accumulation: Literal["auto", "fused", "unfused"] = "auto"
    """fused: the matrix product itself adds weight gradients to the fp32 buffer, by apex's CUDA extension or transformer-engine's linear
    layers. unfused: a separate operation adds them."""
    experts: Literal["auto", "grouped_mm", "loop"] = "auto"
    """The products with the matrices of a mixture of experts. grouped_mm: torch's product for all experts of a rank at once; on CUDA it
    needs bf16 and compute capability 9 or 10, and everywhere rows of a multiple of 16 bytes. loop: a product for each expert."""
    adamw: Literal["auto", "te", "apex", "torch"] = "auto"
    """AdamW. te: transformer-engine's FusedAdam. apex: apex's FusedAdam. torch: torch's fused kernel."""


@dataclass(slots=True, kw_only=True)
class ValidationConfig:
    """Validation with fixed noise at fixed timesteps."""

    interval: PositiveInteger = 1000
    """Steps between validations. A run also validates before its first step and after its last step."""
    num_samples: PositiveInteger = 128
    """Number of samples, taken from the start of the validation set; fewer if the set is smaller."""
    timesteps: list[PositiveFraction] = field(default_factory=lambda: [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95])
    """Every sample is scored at each of these t. They are midpoints of equal bins, so that the mean approximates the ELBO's integral. A
    process whose bound varies near both ends turns each into another t (docs/objectives.md)."""
    block_sizes: list[Length] = field(default_factory=list)
    """Block sizes at which the samples are scored in addition to the current block size; data.sequence_length stands for masked
    diffusion."""


@dataclass(slots=True, kw_only=True)
class Config:
    """The configuration of a run."""

    name: str
    """Name of the run, whose directory is runs_dir/name."""
    runs_dir: RequiredPath = "runs"
    """Directory that holds the run directories."""
    model: ModelConfig
    data: DataConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig
    training: TrainingConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

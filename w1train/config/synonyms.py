"""Names that people type from habit with other frameworks, and what this project has in their place.

A name that is close to a key (``hiden_size``) is found by its letters (``w1train.config.from_tree``). The names of this table are not close
to the right key, or are close to a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAGE = "schedule.stages.NAME."
"""Begins the key of a field of a stage, whose name the recipe chooses."""


@dataclass(frozen=True, slots=True)
class Synonym:
    """The key that stands for a name, with a note."""

    key: str | None
    """The key, in which NAME stands for the name of a stage; None = w1train has no such option."""
    is_same: bool
    """True: the value of the name is a value of the key too. False: the value has to be written in another way."""
    note: str
    """The sentences that say how the value is written, or why there is no such option."""


_COUNTS_TOKENS = (
    "A stage counts tokens: steps x training.global_batch_size x data.sequence_length. For a trial, --max-steps 100 ends the run early."
)
_COUNTS_TOKENS_OF_WARMUP = "The warmup is the first stage, which counts tokens: steps x training.global_batch_size x data.sequence_length."
_EACH_STAGE = "Each stage has the rate that it ends with, such as 3e-4."
_LAST_STAGE = "The smallest rate is that of the last stage, which reaches it if its style is linear, cosine or one_minus_sqrt."
_MICRO = "It is the number of samples of one pass on one rank, and divides training.global_batch_size."
_GLOBAL = "It is the number of samples of one step over all ranks; training.micro_batch_size is the number of one pass on one rank."
_ACCUMULATED = (
    "Accumulation follows from the sizes: training.global_batch_size / (training.micro_batch_size x data-parallel ranks) micro-batches."
)
_RESUME = "The same command resumes the run by itself. checkpoint.resume_step=1000 goes back to an earlier checkpoint of this run."
_RANKS = (
    "The number of data-parallel ranks is the number of ranks / (tensor x pipeline x context). w1train train --nproc 8 starts eight ranks."
)
_WANDB = "Its value is auto, online, offline or disabled."
_COMPILE = "w1train does not compile the whole model. The options under kernels choose fused kernels, and auto is the fastest choice."
_DROPOUT = "w1train has no dropout: the noise process already gives each pass over a text another input."
_EXPERTS = "Mixtures of experts are not supported yet, and neither is expert parallelism."

# Names, the key, and the note. A key that ends with an equals sign takes the value of the name as it is.
_TABLE: tuple[tuple[str, str | None, str], ...] = (
    ("lr learning_rate max_lr peak_lr base_lr max_learning_rate", f"{STAGE}learning_rate=", _EACH_STAGE),
    ("min_lr end_lr final_lr min_learning_rate", f"{STAGE}learning_rate", _LAST_STAGE),
    (
        "lr_scheduler lr_scheduler_type lr_decay_style scheduler lr_schedule",
        f"{STAGE}style",
        "It is constant, linear, cosine or one_minus_sqrt.",
    ),
    ("max_steps num_steps steps total_steps train_steps num_train_steps num_training_steps", f"{STAGE}tokens", _COUNTS_TOKENS),
    ("max_iters train_iters num_iterations iterations iters max_iterations max_iter", f"{STAGE}tokens", _COUNTS_TOKENS),
    ("max_tokens total_tokens train_tokens num_tokens token_budget", f"{STAGE}tokens", "The run ends with its last stage."),
    (
        "epochs num_epochs max_epochs num_train_epochs",
        f"{STAGE}tokens",
        "A run has no number of epochs: the tokens of its stages say how long it is.",
    ),
    ("warmup_steps warmup_iters num_warmup_steps lr_warmup_iters lr_warmup_steps", f"{STAGE}tokens", _COUNTS_TOKENS_OF_WARMUP),
    ("warmup_tokens warmup warmup_ratio", f"{STAGE}tokens", "The warmup is the first stage; its tokens are its length."),
    ("decay_steps lr_decay_iters lr_decay_steps", f"{STAGE}tokens", "The decay is the last stage, which counts tokens."),
    ("batch_size train_batch_size total_batch_size global_batch training.batch_size gbs", "training.global_batch_size=", _GLOBAL),
    ("micro_batch mbs device_batch_size per_device_train_batch_size local_batch_size", "training.micro_batch_size=", _MICRO),
    (
        "gradient_accumulation_steps grad_accum accumulate_grad_batches gradient_accumulation grad_accum_steps",
        "training.global_batch_size",
        _ACCUMULATED,
    ),
    (
        "seq_len seq_length sequence_len context_length max_seq_len max_seq_length ctx_len n_ctx max_length seqlen",
        "data.sequence_length=",
        "It is the number of tokens of one sample.",
    ),
    ("max_position_embeddings n_positions", "model.max_sequence_length=", "It is the largest number of positions of a document."),
    (
        "block_len diffusion_block_size",
        "diffusion.block_size=",
        "It is the number of tokens that are denoised together; null is masked diffusion of whole documents.",
    ),
    (
        "block_size",
        "diffusion.block_size=",
        "It is the number of tokens that are denoised together. The length of a sample is data.sequence_length.",
    ),
    (
        "tp tp_size tensor_parallel tensor_parallel_size tensor_model_parallel_size tensor_model_parallel_degree",
        "parallel.tensor=",
        "It is the number of tensor-parallel ranks, such as 2.",
    ),
    (
        "pp pp_size pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size",
        "parallel.pipeline=",
        "It is the number of pipeline stages, such as 2.",
    ),
    ("cp cp_size context_parallel context_parallel_size", "parallel.context=", "It is the number of context-parallel ranks, such as 2."),
    (
        "vpp virtual_pipeline_model_parallel_size num_virtual_stages virtual_pipeline_size",
        "parallel.virtual_pipeline=",
        "It is the number of model chunks on each pipeline stage.",
    ),
    ("sp sequence_parallel", "parallel.sequence=", "It is true or false, and needs parallel.tensor above 1."),
    ("dp dp_size data_parallel data_parallel_size parallel.data world_size nproc num_gpus gpus nproc_per_node ngpus devices", None, _RANKS),
    ("ep ep_size expert_parallel expert_parallel_size expert_model_parallel_size num_experts num_moe_experts moe", None, _EXPERTS),
    (
        "fsdp zero zero_stage use_fsdp zero1 use_distributed_optimizer",
        "parallel.distributed_optimizer",
        "It is true or false, and shards what ZeRO-1 shards. FSDP is not supported.",
    ),
    (
        "activation_checkpointing gradient_checkpointing recompute_granularity activation_checkpoint",
        "parallel.recompute",
        "Its values: none, selective, full.",
    ),
    (
        "bf16 fp16 dtype mixed_precision amp torch_dtype param_dtype fp32",
        "training.precision",
        "It is bf16 or fp32; fp16 is not supported.",
    ),
    ("compile torch_compile use_compile torch.compile model.compile", None, _COMPILE),
    (
        "flash_attn flash_attention use_flash_attn attn_implementation attention_backend attn",
        "attention.backend",
        "It is auto, cudnn, flex, te, sdpa or reference.",
    ),
    ("dropout attention_dropout hidden_dropout resid_dropout attn_dropout embd_dropout dropout_rate", None, _DROPOUT),
    ("n_layer n_layers layers depth num_hidden_layers nlayers", "model.num_layers=", "It is the number of layers of the Transformer."),
    ("dim n_embd d_model embed_dim hidden_dim model_dim n_embed width", "model.hidden_size=", "It is the width of the residual stream."),
    ("num_heads n_head n_heads heads nhead", "model.num_attention_heads=", "It is the number of query heads."),
    ("n_kv_heads num_kv_heads num_key_value_heads kv_heads n_kv_head", "model.num_query_groups=", "It is the number of key/value heads."),
    ("head_dim d_head head_size", "model.kv_channels=", "It is the number of channels of one head."),
    ("intermediate_size ffn_dim d_ff mlp_dim ffn_hidden", "model.ffn_hidden_size=", "It is the inner width of SwiGLU."),
    ("rope_theta rotary_base", "model.rope_base=", "It is the base of the rotary position embedding, such as 10000."),
    ("rms_norm_eps norm_eps layer_norm_eps layernorm_epsilon", "model.norm_epsilon=", "It is the epsilon of every RMSNorm."),
    ("tie_word_embeddings tied_embeddings weight_tying", "model.tie_embeddings=", "It is true or false."),
    (
        "grad_clip gradient_clip_val max_grad_norm clip_grad_norm gradient_clipping grad_norm_clip max_norm clip",
        "optimizer.clip_grad=",
        "It is the largest norm of the gradient; 0 switches the limit off.",
    ),
    ("betas adam_betas optimizer.betas", "optimizer.beta1", "Each has a key of its own: optimizer.beta1=0.9 optimizer.beta2=0.95."),
    ("adam_beta1", "optimizer.beta1=", "It is the decay of the first moment."),
    ("adam_beta2", "optimizer.beta2=", "It is the decay of the second moment."),
    ("adam_eps adam_epsilon eps", "optimizer.epsilon=", "It is added to the root of the second moment."),
    ("wd adam_weight_decay", "optimizer.weight_decay=", "It is a number such as 0.1."),
    ("optim optimizer_name optimizer_type", "optimizer.name", "It is adamw or muon."),
    ("seed random_seed rng_seed manual_seed", "training.seed=", "It is one number for the weights, the order of the data and the noise."),
    (
        "save_interval save_every save_steps checkpoint_interval ckpt_interval save_freq checkpoint_every",
        "checkpoint.interval=",
        "It is the number of steps between checkpoints.",
    ),
    (
        "save_total_limit keep_last keep_latest_k keep_checkpoints keep_last_n",
        "checkpoint.keep=",
        "It is the number of newest checkpoints that are kept.",
    ),
    (
        "output_dir out_dir save_dir work_dir run_dir log_dir save_folder",
        "runs_dir=",
        "The run's directory is runs_dir/name, such as runs_dir=/scratch/runs name=second.",
    ),
    ("checkpoint_dir ckpt_dir checkpoint_path checkpoints_dir save", "runs_dir", "Checkpoints are in runs_dir/name/checkpoints."),
    (
        "run_name exp_name experiment_name experiment job_name wandb_run_name wandb_name wandb.name",
        "name=",
        "It names the run's directory under runs_dir.",
    ),
    ("resume resume_from resume_from_checkpoint load auto_resume resume_path load_checkpoint", "checkpoint.resume_step", _RESUME),
    (
        "init_from pretrained pretrained_model model_name_or_path model_name init_ckpt load_weights from_pretrained",
        "training.initial_weights",
        "It is the path of a Hugging Face directory, a run directory or a checkpoint.",
    ),
    ("wandb use_wandb wandb_mode wandb.mode report_to wandb.enabled logging.wandb.mode", "logging.wandb", _WANDB),
    (
        "wandb_project wandb.project project logging.wandb.project project_name",
        "logging.wandb_project=",
        "It is the name of the project in Weights & Biases.",
    ),
    (
        "tensorboard use_tensorboard tensorboard_dir",
        "logging.tensorboard",
        "It is true or false; the files are in tensorboard/ of the run directory.",
    ),
    (
        "log_interval log_every logging_steps log_freq print_every log_every_n_steps log_steps",
        "logging.interval=",
        "It is the number of steps between lines on the console.",
    ),
    (
        "eval_interval eval_every eval_steps val_interval eval_freq validation_interval eval.interval val_check_interval",
        "validation.interval=",
        "It is the number of steps between validations.",
    ),
    (
        "eval_iters eval_batches val_steps limit_val_batches eval_samples",
        "validation.num_samples",
        "It is the number of samples that are scored.",
    ),
    ("sample_interval sample_every", "sampling.interval=", "It is the number of steps between samples; 0 means never."),
    (
        "sampling_steps diffusion_steps denoising_steps",
        "sampling.num_steps=",
        "It is the number of denoising steps of all blocks together.",
    ),
    ("gen_length max_new_tokens gen_len", "sampling.num_tokens=", "It is the number of tokens after the prompt."),
    (
        "num_loader_workers dataloader_num_workers workers loader_workers",
        "data.num_workers=",
        "It is the number of workers that prepare batches ahead of the step.",
    ),
    (
        "train_data data_path dataset train_path train_file dataset_path train_data_path data_dir data_prefix",
        "data.train",
        "It is the prefix of a tokenized dataset: data/train for data/train.bin. w1train data tokenize makes it.",
    ),
    (
        "val_data eval_data valid_data val_path validation_data validation_file data.val data.valid data.eval",
        "data.validation",
        "It is the prefix of a tokenized dataset, such as data/validation.",
    ),
    ("tokenizer tokenizer_path tokenizer_model tokenizer_name tokenizer_file", "data.tokenizer", "It is the path of a tokenizer.json."),
    ("mask_id mask_token mask_token_index mask_idx", "diffusion.mask_token_id=", "It is the id of <mask> in the tokenizer."),
    ("padded_vocab_size vocabulary_size n_vocab", "model.vocab_size", "It is the number of ids of the model, special tokens included."),
    ("fp8_format use_fp8 fp8_recipe", "training.fp8", "Its values: none, tensorwise, blockwise."),
    ("profile use_profiler profiler profile_steps", "profiling.steps", "It is the list of steps to profile, such as [20,21]."),
    (
        "device accelerator cuda cpu use_cpu",
        None,
        "w1train uses the GPUs that it sees. CUDA_VISIBLE_DEVICES= (empty) in front of the command trains on the CPU.",
    ),
    (
        "ema ema_decay use_ema",
        "checkpoint.average_at_end",
        "There is no moving average. This option averages the best checkpoints at the end, and w1train average does it at any time.",
    ),
    ("label_smoothing z_loss", None, "w1train has no such term: the loss is the weighted cross-entropy, whose sum bounds the likelihood."),
)

SYNONYMS: Mapping[str, Synonym] = {
    name: Synonym(key and key.removesuffix("="), (key or "").endswith("="), note) for names, key, note in _TABLE for name in names.split()
}
"""The synonym for each name. A name with a dot is a whole key, any other name is the last part of a key."""

_OFF, _ON = ("off", "false", "none", "no", "disable", "0"), ("on", "true", "yes", "enabled", "1")
VALUE_SYNONYMS: Mapping[str, Mapping[str, str]] = {
    "logging.wandb": {**dict.fromkeys(_OFF, "disabled"), **dict.fromkeys(_ON, "online")},
    "training.precision": {
        **dict.fromkeys(("bfloat16", "bf16-mixed", "bf16_mixed", "mixed", "bf16-true"), "bf16"),
        **dict.fromkeys(("float32", "32", "fp32-true", "float", "single", "no"), "fp32"),
        **dict.fromkeys(("fp16", "float16", "16", "half", "16-mixed"), "bf16"),
    },
    "parallel.recompute": {**dict.fromkeys(_OFF, "none"), **dict.fromkeys(_ON, "full")},
    "training.fp8": {**dict.fromkeys(_OFF, "none"), **dict.fromkeys((*_ON, "delayed", "hybrid", "e4m3"), "tensorwise")},
}
"""The right value for values that people type, in small letters, by key."""


def hint_for(path: str, value: str | None = None, stages: Sequence[str] = (), *, whole: bool = False) -> str | None:
    """Return what to write in the place of an unknown key, or None if the table does not have it.

    Args:
        path: the key as it was typed.
        value: the value that was typed, as text; None = no value.
        stages: the names of the run's stages.
        whole: True looks only for the whole key, and not for its last part.
    """
    name = path.lower().replace("-", "_")
    synonym = SYNONYMS.get(name) or (None if whole else SYNONYMS.get(name.rpartition(".")[2]))
    if synonym is None or synonym.key is None:
        return None if synonym is None else synonym.note
    key, names = _at_stage(synonym.key, path, stages)
    meant = value if synonym.is_same or value is None else value_for(key, value)
    return f"did you mean {key}{'' if meant is None else f'={meant}'}? {synonym.note}{names}"


def value_for(key: str, value: object) -> str | None:
    """Return the value of an option with fixed choices that a typed value means, or None if the table does not have it."""
    return VALUE_SYNONYMS.get(key, {}).get(str(value).lower())


def _at_stage(key: str, path: str, stages: Sequence[str]) -> tuple[str, str]:
    """Return the key with the name of the stage that the path has, and a sentence with the names of the stages if it has no stage."""
    if not key.startswith(STAGE):
        return key, ""
    if path.startswith("schedule.stages.") and path.count(".") == STAGE.count("."):
        return f"{path.rpartition('.')[0]}.{key.removeprefix(STAGE)}", ""
    return key, f" The stages of this run are: {', '.join(stages)}." if stages else ""

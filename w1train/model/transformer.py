"""The diffusion Transformer: embedding, conditioned layers, and a head where a loss is taken.

Shapes: b = samples, l = sequence_length, s = tokens of this rank (l, or l / tensor under sequence parallelism),
h = hidden size, g = segments, c = condition size, m = positions with logits, v = vocabulary of this rank, d = head channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from w1train.attention.attention_plan import AttentionPlan
from w1train.config.schema import ModelConfig
from w1train.diffusion.embedding_noise import EmbeddingNoise
from w1train.kernels.segments import Segments
from w1train.model.conditioning import Modulation, TimestepEmbedding
from w1train.model.head import OutputHead
from w1train.model.layer import LayerInputs, layer_spec
from w1train.model.norm import ModulatedRMSNorm
from w1train.model.rotary import rotary_angles
from w1train.runtime.ranges import step_part


@dataclass(slots=True)
class ModelInputs:
    """One micro-batch as the model sees it."""

    input_ids: Tensor
    """int64 [b, l], corrupted tokens."""
    positions: Tensor
    """int [b, l], position inside the document."""
    attention_plan: AttentionPlan
    segment_timesteps: Tensor
    """float32 [g]: t of each segment."""
    segment_index: Tensor | None
    """int64 [b, l]: segment of each token; None = segment i is sample i."""
    logit_positions: Tensor
    """int64 [m]: flattened (b * l + position) places where logits are computed."""
    embedding_noise: EmbeddingNoise | None = None
    """Added to what is embedded; None = nothing is."""


class TokenEmbedding(MegatronModule):
    """Vocabulary-parallel embedding (a module of its own because megatron-core looks for ``embedding.word_embeddings``).

    A MegatronModule, for megatron-core's sharded state looks into no other: it would save one rank's rows as the whole table.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, tensor_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config)
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            config.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=tensor_group,
        )
        self.sequence_parallel = config.sequence_parallel

    def forward(self, input_ids: Tensor) -> Tensor:
        """int64 [b, l] -> [s, b, h]."""
        embedded = self.word_embeddings(input_ids)
        # With reduce-scatter the embedding has already put the sequence first, to split it.
        return embedded if self.sequence_parallel else embedded.transpose(0, 1).contiguous()


class DiffusionTransformer(LanguageModule):
    """One pipeline stage (all of the model when there is one)."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        mask_token_id: int | None,
        loss_chunk_size: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """
        Args:
            mask_token_id: the token that is taken out of the softmax; None = none is.
            loss_chunk_size: positions whose logits exist at once while the loss is computed; None = all.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        self.model = model
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = model.tie_embeddings
        conditioned = model.conditioning == "adaln"
        if pre_process:
            self.embedding = TokenEmbedding(config, model.vocab_size, self.tp_group)
        self.timestep_embedding = TimestepEmbedding(config, model) if conditioned else None
        self.decoder = TransformerBlock(
            config,
            layer_spec(model),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.final_norm = ModulatedRMSNorm(config, config.hidden_size, config.layernorm_epsilon)
            self.final_modulation = Modulation(config, model.condition_size, num_vectors=2) if conditioned else None
            self.output_layer = OutputHead(
                config,
                model,
                mask_token_id=mask_token_id,
                loss_chunk_size=loss_chunk_size,
                has_weight=not (pre_process and model.tie_embeddings),
                tensor_group=self.tp_group,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        self._mark_replicated_over_pipeline()

    def _mark_replicated_over_pipeline(self) -> None:
        """Every stage has the timestep embedding: its gradients are summed over stages, and its norm is counted once."""
        if self.timestep_embedding is None or self.config.pipeline_model_parallel_size == 1:
            return
        for parameter in self.timestep_embedding.parameters():
            parameter.pipeline_parallel = True
            parameter.shared = not self.pre_process
            # The distributed optimizer shards a gradient before the stages add theirs up. Only in a bucket of its own is
            # a parameter cut at the same places on every stage; elsewhere each stage would add a different slice.
            parameter.shared_embedding = True

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states from the previous stage; called by megatron-core's schedules."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    @step_part("forward")
    def forward(self, inputs: ModelInputs, targets: Tensor | None = None) -> Tensor:
        """Cross-entropies in nats, float32 [m], or without targets logits [m, v] on the last stage, hidden states [s, b, h] on the others.

        Args:
            targets: int64 [m], the right tokens at ``inputs.logit_positions``.
        """
        condition = None if self.timestep_embedding is None else self.timestep_embedding(inputs.segment_timesteps)
        hidden = self.decoder(
            hidden_states=self._embed(inputs) if self.pre_process else None,
            attention_mask=None,
            context=condition,
            rotary_pos_emb=rotary_angles(inputs.positions, self.config.kv_channels, self.model),
            packed_seq_params=LayerInputs(inputs.attention_plan, Segments(self._local_segment_index(inputs))),
        )
        if not self.post_process:
            return hidden
        rows = self._head_inputs(hidden, condition, inputs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(rows, weight=weight, targets=targets)

    def _embed(self, inputs: ModelInputs) -> Tensor:
        embedded = self.embedding(inputs.input_ids)
        if torch.is_grad_enabled() and not embedded.requires_grad:
            # Under a frozen embedding nothing that goes into the first recomputed layers would ask for a gradient, and megatron-core's
            # recomputation then gives their parameters none, without a word.
            embedded.requires_grad_()
        if inputs.embedding_noise is None:
            return embedded
        first_column = get_pg_rank(self.tp_group) * len(embedded) if self.config.sequence_parallel else None
        return inputs.embedding_noise.add_to(embedded, first_column)

    def _local_segment_index(self, inputs: ModelInputs) -> Tensor | None:
        """[b, l] -> this rank's [s, b]."""
        if inputs.segment_index is None:
            return None
        index = inputs.segment_index.transpose(0, 1)
        if self.config.sequence_parallel:
            index = index.chunk(get_pg_size(self.tp_group))[get_pg_rank(self.tp_group)]
        return index.contiguous()

    def _head_inputs(self, hidden: Tensor, condition: Tensor | None, inputs: ModelInputs) -> Tensor:
        """[s, b, h] -> [m, h]: final norm and final adaLN at ``logit_positions`` only. At the others of a masked-diffusion batch the head
        would cost its FLOPs and a vocabulary's memory for nothing."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        length, num_samples, size = hidden.shape
        sample = torch.div(inputs.logit_positions, length, rounding_mode="floor")
        position = inputs.logit_positions % length
        rows = hidden.reshape(-1, size).index_select(0, position * num_samples + sample)
        if self.final_modulation is None:
            return self.final_norm(rows)
        segment = sample if inputs.segment_index is None else inputs.segment_index.flatten()[inputs.logit_positions]
        return self.final_norm(rows, *self.final_modulation(condition), Segments(segment))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """As megatron-core's, with one owner for the timestep embedding that every stage holds."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        stage = (get_pg_rank(self.pp_group), self.vp_stage or 0)
        for key, value in state.items():
            if key.startswith(f"{prefix}timestep_embedding."):
                value.replica_id = (0 if stage == (0, 0) else 1 + stage[0] + stage[1] * get_pg_size(self.pp_group), *value.replica_id[1:])
        return state

"""The diffusion Transformer: embedding, conditioned layers, and an output head for the positions where a loss is taken.

Shapes: b = samples, l = sequence_length, s = tokens of this rank (l, or l / tensor under sequence parallelism),
h = hidden size, g = segments, c = condition size, m = positions with logits, v = vocabulary of this rank, d = head channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from w1train.attention.attention_plan import AttentionPlan
from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import AdaptersConfig
from w1train.diffusion.embedding_noise import EmbeddingNoise
from w1train.kernels.segments import Segments
from w1train.model.conditioning import Modulation, TimestepEmbedding
from w1train.model.experts.block_pools import RoutingBlocks
from w1train.model.experts.routed_tokens import RoutedTokens
from w1train.model.experts.router_losses import RouterLosses
from w1train.model.head import OutputHead
from w1train.model.layer import LayerInputs, layer_specs
from w1train.model.noise_rates import NoiseRates
from w1train.model.norm import ModulatedRMSNorm
from w1train.model.rotary import rotary_angles
from w1train.model.row_terms import RowTerm
from w1train.runtime.ranges import step_part


@dataclass(slots=True)
class ModelInputs:
    """One micro-batch, as the model reads it."""

    input_ids: Tensor
    """int64 [b, l], corrupted tokens."""
    positions: Tensor
    """int [b, l], position inside the document."""
    attention_plan: AttentionPlan
    segment_timesteps: Tensor
    """float32 [g]: timestep t of each segment."""
    segment_index: Tensor | None
    """int64 [b, l]: segment of each token; None = segment i is sample i."""
    logit_positions: Tensor
    """int64 [m]: places where logits are computed, as sample * l + position."""
    embedding_noise: EmbeddingNoise | None = None
    """Noise that is added to the embeddings; None = no noise is added."""
    token_kinds: Tensor | None = None
    """uint8 [b, l]: the TokenKind of each token, for a mixture of experts; None = experts' tokens are not counted."""
    router_losses: RouterLosses | None = None
    """The losses that the routers of a mixture of experts add; None = they add no loss."""
    routing_blocks: RoutingBlocks | None = None
    """The blocks that share pools of experts; None without model.experts.pool_per_block."""


def _layers_of_stage(config: TransformerConfig, vp_stage: int | None, groups: ProcessGroupCollection) -> range:
    """Return the numbers, from 0, of the layers of this pipeline stage."""
    rank = get_pg_rank(groups.pp)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank)
    return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=rank))


class TokenEmbedding(MegatronModule):
    """Vocabulary-parallel embedding, in a module of its own because megatron-core looks for ``embedding.word_embeddings``.

    It must be a MegatronModule: megatron-core's sharded state does not ask other modules how they are split, and would save the rows of
    one rank as the whole table.
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
        """Return the embeddings [s, b, h] of tokens, int64 [b, l]."""
        embedded = self.word_embeddings(input_ids)
        # With reduce-scatter the embedding returns the sequence dimension first, because it splits it.
        return embedded if self.sequence_parallel else embedded.transpose(0, 1).contiguous()


class DiffusionTransformer(LanguageModule):
    """One pipeline stage of the model, or the whole model if there is one stage."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        mask_token_id: int | None,
        adapters: AdaptersConfig | None = None,
        loss_chunk_size: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """
        Args:
            mask_token_id: the token that is taken out of the softmax; None = every token is in it.
            adapters: the adapters of linear layers; None = there are no adapters.
            loss_chunk_size: positions whose logits exist at once while row terms are computed; None = all positions.
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
            layer_specs(model, adapters or AdaptersConfig(), _layers_of_stage(config, vp_stage, self.pg_collection)),
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        learns = post_process and model.learns_noise_rates
        self.noise_rates = NoiseRates(config, model.vocab_size, self.tp_group) if learns else None
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
        """Mark the timestep embedding, which every stage has: its gradients are summed over stages, and its norm is counted once."""
        if self.timestep_embedding is None or self.config.pipeline_model_parallel_size == 1:
            return
        for parameter in self.timestep_embedding.parameters():
            parameter.pipeline_parallel = True
            parameter.shared = not self.pre_process
            # The distributed optimizer shards a gradient before the stages add up their gradients. A parameter is cut at the same places on
            # every stage only if it has a bucket of its own. In another bucket each stage would add a different slice.
            parameter.shared_embedding = True

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the hidden states of the previous stage. megatron-core's schedules call this."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    @step_part("forward")
    def forward(self, inputs: ModelInputs, terms: Sequence[RowTerm] | None = None) -> Tensor | tuple[Tensor, ...]:
        """Return hidden states [s, b, h], or on the last stage logits [m, v] or the values of terms.

        Args:
            terms: the terms to compute from the logits at ``inputs.logit_positions``; None = return the logits themselves.
        """
        condition = None if self.timestep_embedding is None else self.timestep_embedding(inputs.segment_timesteps)
        hidden = self.decoder(
            hidden_states=self._embed(inputs) if self.pre_process else None,
            attention_mask=None,
            context=condition,
            rotary_pos_emb=rotary_angles(inputs.positions, self.model.rotary_channels or self.config.kv_channels, self.model),
            packed_seq_params=LayerInputs(inputs.attention_plan, Segments(self._local(inputs.segment_index)), self._routed_tokens(inputs)),
        )
        if not self.post_process:
            return hidden
        rows = self._head_inputs(hidden, condition, inputs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(rows, weight=weight, terms=terms)

    def _embed(self, inputs: ModelInputs) -> Tensor:
        embedded = self.embedding(inputs.input_ids)
        if torch.is_grad_enabled() and not embedded.requires_grad:
            # With a frozen embedding no input of the first recomputed layers would need a gradient, and megatron-core's recomputation would
            # then compute no gradients for their parameters, without an error.
            embedded.requires_grad_()
        if inputs.embedding_noise is None:
            return embedded
        first_column = get_pg_rank(self.tp_group) * len(embedded) if self.config.sequence_parallel else None
        return inputs.embedding_noise.add_to(embedded, first_column)

    def _routed_tokens(self, inputs: ModelInputs) -> RoutedTokens | None:
        kinds, blocks = self._local(inputs.token_kinds), inputs.routing_blocks
        if blocks is not None:
            blocks = RoutingBlocks(self._local(blocks.index), blocks.num_blocks)
        return None if kinds is None and blocks is None else RoutedTokens(kinds, inputs.router_losses, blocks)

    def _local(self, values: Tensor | None) -> Tensor | None:
        """Return the values [s, b] of this rank's tokens, from those of all tokens [b, l]."""
        if values is None:
            return None
        values = values.transpose(0, 1)
        if self.config.sequence_parallel:
            values = values.chunk(get_pg_size(self.tp_group))[get_pg_rank(self.tp_group)]
        return values.contiguous()

    def _head_inputs(self, hidden: Tensor, condition: Tensor | None, inputs: ModelInputs) -> Tensor:
        """Return the final norm with the final adaLN at ``logit_positions``, [m, h], from hidden states [s, b, h].

        Nobody needs the logits of other positions. Each of these positions would cost FLOPs of the head, and memory for one number per
        token of the vocabulary.
        """
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
        """Return megatron-core's sharded state, in which one stage owns the timestep embedding that every stage has."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        stage = (get_pg_rank(self.pp_group), self.vp_stage or 0)
        for key, value in state.items():
            if key.startswith(f"{prefix}timestep_embedding."):
                value.replica_id = (0 if stage == (0, 0) else 1 + stage[0] + stage[1] * get_pg_size(self.pp_group), *value.replica_id[1:])
        return state

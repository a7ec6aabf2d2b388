"""What a micro-batch contains: positions, visible pairs, logits and segments, from the recipe and a packing assumption."""

from __future__ import annotations

import math
from dataclasses import dataclass

from w1train.config.schema import Config
from w1train.training.flops import FlopsByPart, model_flops


@dataclass(frozen=True, slots=True)
class Workload:
    """One packed sample."""

    num_tokens: int
    """Tokens of data."""
    num_streams: int
    """Positions in the layers for each token: 1, or 2 where a clean copy runs beside the noisy one."""
    num_documents: int
    """Documents in it, all of one length but for the last."""
    visible_pairs: int
    """(query, key) pairs that may attend, one layer, one head."""
    num_logits: float
    """Expected positions where a loss is taken."""
    most_logits: int
    """At the largest t."""
    num_segments: int
    """Stretches that share a timestep."""
    needs_mask: bool
    """Whether a micro-batch may need a dense mask: several documents, or samples cut short."""

    @property
    def num_positions(self) -> int:
        return self.num_tokens * self.num_streams

    @property
    def visible_share(self) -> float:
        """Of all pairs of positions."""
        return self.visible_pairs / self.num_positions**2


def workload_of(config: Config, document_length: int | None = None) -> Workload:
    """The samples of a recipe whose documents have the given length; None = one document fills the sample.

    Raises:
        ValueError: ``document_length`` is below 1.
    """
    if document_length is not None and document_length < 1:
        raise ValueError(f"the document length is {document_length}; give at least 1 token, or leave it out for whole sequences")
    length, diffusion = config.data.sequence_length, config.diffusion
    document = min(document_length or length, length)
    num_documents = math.ceil(length / document)
    return Workload(
        num_tokens=length,
        num_streams=1,
        num_documents=num_documents,
        visible_pairs=document_pairs(length, document),
        # t is uniform between its bounds, and a token is masked with probability t.
        num_logits=length * (diffusion.t_min + diffusion.t_max) / 2,
        most_logits=math.ceil(length * diffusion.t_max),
        num_segments=num_documents if diffusion.timestep_per == "document" else 1,
        needs_mask=num_documents > 1 or diffusion.random_length_probability > 0,
    )


def document_pairs(length: int, document: int) -> int:
    """Pairs inside documents, attention in both directions: floor(L / d) d^2 + (L mod d)^2."""
    whole, rest = divmod(length, document)
    return whole * document * document + rest * rest


def flops_per_token(config: Config, work: Workload) -> dict[str, float]:
    """Model FLOPs, forward and backward, of one token of data, by part and in total.

    ``model_flops`` counts whole things, so it is asked for many samples, of which the expected logits are a whole number.
    """
    num_samples = 1_000_000
    flops: FlopsByPart = model_flops(
        config.model,
        num_tokens=num_samples * work.num_positions,
        visible_pairs=num_samples * work.visible_pairs,
        num_logits=round(num_samples * work.num_logits),
        num_segments=num_samples * work.num_segments,
    )
    tokens = num_samples * work.num_tokens
    parts = {name: getattr(flops, name) / tokens for name in FlopsByPart.__slots__}
    return {**parts, "total": flops.total / tokens}

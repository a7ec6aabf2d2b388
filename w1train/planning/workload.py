"""The contents of a micro-batch: positions, visible pairs, logits and segments, from the recipe and an assumption about packing."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from w1train.config.schema import Config, DiffusionConfig
from w1train.diffusion.process import NoiseProcess, trains_every_token
from w1train.diffusion.processes import noise_process
from w1train.model.flops import FlopsByPart, model_flops
from w1train.objectives.description import num_measuring_passes, num_streams, samples_are_segments


@dataclass(frozen=True, slots=True)
class Workload:
    """One packed sample."""

    num_tokens: int
    """Tokens of data in the sample."""
    num_streams: int
    """Positions in the layers for each token: 1, or 2 if a clean stream runs with the noisy stream (block diffusion)."""
    num_documents: int
    """Documents in the sample, which have equal lengths except for the last."""
    visible_pairs: int
    """Visible (query, key) pairs in one layer and one head."""
    num_logits: float
    """Expected number of positions with a loss."""
    most_logits: int
    """Number of positions with a loss at the largest t."""
    num_segments: int
    """Segments, whose tokens share a timestep."""
    segment_indexed: bool
    """True: an index gives each token's segment. False: segments are samples."""
    may_need_mask: bool
    """True: a micro-batch may need a dense mask, because it has several documents, two streams, or samples that were cut short."""
    block_spans: tuple[tuple[int, int], ...]
    """First position and end of each block; empty with one stream."""

    @property
    def num_positions(self) -> int:
        return self.num_tokens * self.num_streams

    @property
    def num_clean_segments(self) -> int:
        """Segments of the clean streams: one for a whole micro-batch, at t = 0."""
        return self.num_streams - 1

    @property
    def visible_share(self) -> float:
        """Share of all pairs of positions that are visible."""
        return self.visible_pairs / self.num_positions**2

    @property
    def is_masked(self) -> bool:
        """Tell whether every micro-batch needs a mask."""
        return self.num_documents > 1 or self.num_streams > 1

    def blocks_stay_home(self, chunk_size: int) -> bool:
        """Tell whether no block crosses the border of a chunk of the context-parallel ranks."""
        return all(start // chunk_size == (end - 1) // chunk_size for start, end in self.block_spans)

    def memory_key(self, context_chunk_size: int) -> Hashable:
        """Return what decides the memory of a micro-batch of this sample, in every layout."""
        home = self.blocks_stay_home(context_chunk_size)
        return home, replace(self, visible_pairs=0, num_logits=0.0, block_spans=())


def workload_of(config: Config, document_length: int | None = None) -> Workload:
    """Return the samples of a recipe whose documents have the given length; None = one document fills the sample."""
    length, diffusion = config.data.sequence_length, config.diffusion
    document = min(document_length or length, length)
    num_documents = math.ceil(length / document)
    process, has_clean_stream = noise_process(diffusion), num_streams(config) == 2
    autoregressive = process.is_causal
    per = "sequence" if autoregressive else diffusion.timestep_per
    spans = block_spans(length, document, diffusion) if has_clean_stream or per == "block" else ()
    num_segments = {"sequence": 1, "document": num_documents, "block": len(spans)}[per]
    # Positions that have a next token in their document.
    num_next = length - num_documents if autoregressive or diffusion.autoregressive_weight > 0 else 0
    of_noisy = 0.0 if autoregressive else 1.0
    # While a mask anneals, fewer pairs are visible than at the end of the annealing. The pairs at the end are counted.
    annealed = diffusion.attention_annealing != "none"
    one_stream = document_pairs(length, document, causal=autoregressive)
    pairs = block_pairs(spans, document, diffusion) if has_clean_stream else one_stream
    mean, most = _predicted_shares(process, diffusion)
    return Workload(
        num_tokens=length,
        num_streams=2 if has_clean_stream else 1,
        num_documents=num_documents,
        visible_pairs=pairs,
        num_logits=num_next + of_noisy * length * mean,
        most_logits=num_next + math.ceil(of_noisy * length * most),
        num_segments=num_segments,
        segment_indexed=not samples_are_segments(config),
        may_need_mask=num_documents > 1 or has_clean_stream or autoregressive or annealed or diffusion.random_length_probability > 0,
        block_spans=spans if has_clean_stream else (),
    )


def _predicted_shares(process: NoiseProcess, diffusion: DiffusionConfig) -> tuple[float, float]:
    """Return the expected share of tokens that have a loss, for t uniform between its bounds, and the largest share in a sample at the
    largest t."""
    times = torch.linspace(diffusion.t_min, diffusion.t_max, 1001, dtype=torch.float64)
    shares = torch.ones_like(times) if trains_every_token(diffusion) else process.predicted_share(times)
    if diffusion.complementary and not process.predicts_every_token and not trains_every_token(diffusion):
        # In one sample of a pair, noise replaces exactly the tokens that the other sample keeps.
        return 0.5, 1 - shares[0].item()
    return shares.mean().item(), 1.0 if process.edits_samples else shares[-1].item()


def document_pairs(length: int, document: int, *, causal: bool = False) -> int:
    """Return the visible pairs inside documents: floor(L / d) d^2 + (L mod d)^2, with d (d + 1) / 2 instead of d^2 under a causal mask."""
    whole, rest = divmod(length, document)
    if causal:
        return whole * _triangle(document) + _triangle(rest)
    return whole * document * document + rest * rest


def _triangle(size: int) -> int:
    return size * (size + 1) // 2


def block_spans(length: int, document: int, diffusion: DiffusionConfig) -> tuple[tuple[int, int], ...]:
    """Return the blocks of a sample, counted from the start of each document or of the sample. Borders of documents also divide blocks."""
    size = diffusion.block_size
    assert size is not None
    starts = set(range(0, length, document))
    if diffusion.block_index == "sample":
        starts.update(range(0, length, size))
    else:
        for first in range(0, length, document):
            starts.update(range(first, min(first + document, length), size))
    ordered = sorted(starts)
    return tuple(zip(ordered, [*ordered[1:], length], strict=True))


def block_pairs(spans: tuple[tuple[int, int], ...], document: int, diffusion: DiffusionConfig) -> int:
    """Return the visible pairs over [x_t ; x_0].

    A noisy token sees its own noisy block and the clean blocks before it in its document; a clean token sees the clean blocks up to its
    own. In their own block both see all tokens, or only tokens before them.
    """
    total = 0
    for start, end in spans:
        size, before = end - start, start % document
        noisy = _triangle(size) if diffusion.noisy_attention == "causal" else size * size
        clean = _triangle(size) if diffusion.clean_attention == "token_causal" else size * size
        total += 2 * size * before + noisy + clean
    return total


def flops_per_token(config: Config, work: Workload) -> dict[str, float]:
    """Return the model FLOPs, forward and backward, of one token of data, by part and in total.

    ``model_flops`` takes whole numbers, so it is called for many micro-batches, whose expected number of logits is a whole number.
    """
    num_batches = 1_000_000
    num_samples = num_batches * config.training.micro_batch_size
    flops: FlopsByPart = model_flops(
        config.model,
        num_tokens=num_samples * work.num_positions,
        visible_pairs=num_samples * work.visible_pairs,
        num_logits=round(num_samples * work.num_logits),
        num_segments=num_samples * work.num_segments + num_batches * work.num_clean_segments,
        adapters=config.adapters,
        num_measuring_passes=num_measuring_passes(config),
    )
    tokens = num_samples * work.num_tokens
    parts = {name: getattr(flops, name) / tokens for name in FlopsByPart.__slots__}
    return {**parts, "total": flops.total / tokens}

"""The numbers that a loss, a likelihood or a sampler may ask of each row of logits: a closed list, one class for each.

Training never holds the logits of all rows over the whole vocabulary. The output head computes a chunk of rows at a time, and all terms
that are asked for in one pass (w1train/model/chunked_head.py); each term writes the gradient of its own value over the chunk's logits.
Evaluation and sampling already have the logits of all rows, and compute a term of them with ``value_of``.
To add a term, write one class in a file of this folder; a Triton kernel for it goes into w1train/kernels.
"""

from w1train.model.row_terms.noised_divergence import FiniteKl, KlIs
from w1train.model.row_terms.row_term import RowStatistics, RowTerm, Vocabulary, value_of
from w1train.model.row_terms.score_ratios import ScoreEntropy
from w1train.model.row_terms.softmax_terms import (
    CrossEntropy,
    Entropy,
    IsMostProbable,
    LogProbabilities,
    MeanLogProbability,
    Reconstruction,
)
from w1train.model.row_terms.weighted_cross_entropy import WeightedCrossEntropy

__all__ = [
    "CrossEntropy",
    "Entropy",
    "FiniteKl",
    "IsMostProbable",
    "KlIs",
    "LogProbabilities",
    "MeanLogProbability",
    "Reconstruction",
    "RowStatistics",
    "RowTerm",
    "ScoreEntropy",
    "Vocabulary",
    "WeightedCrossEntropy",
    "value_of",
]

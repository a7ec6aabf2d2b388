"""Every loss under every process that it goes with, against autograd on all logits, from the loss's definition (references.py)."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.references import reference_values
from tests.tiny import VOCAB_SIZE, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.corruption import corrupt
from w1train.diffusion.processes import noise_process
from w1train.model.chunked_head import Head, linear_row_terms
from w1train.model.row_terms import Vocabulary
from w1train.objectives.loss_rows import loss_rows
from w1train.objectives.objective import objective_of

SIZE = 24
PROCESSES = {
    "masked": {},
    "masked cosine": {"noise_schedule": "cosine"},
    "uniform": {"objective": "uniform"},
    "hybrid": {"objective": "hybrid", "uniform_share": 0.2},
    "log_snr": {"objective": "log_snr", "log_snr_shift": 1.0},
    "token_to_token": {"objective": "token_to_token"},
}
CASES = [
    *((name, {"loss": "cross_entropy", "weight": "constant", "focal_gamma": 2.0, "label_smoothing": 0.1}) for name in PROCESSES),
    *((name, {"loss": "cross_entropy", "weight": "one_minus_t", "loss_positions": "changed"}) for name in PROCESSES),
    *((name, {"loss": "finite_kl", "num_timesteps": 8, "cross_entropy_weight": 0.01}) for name in PROCESSES),
    *((name, {"loss": "reconstruction", "weight": "constant"}) for name in PROCESSES),
    *((name, {"loss": "kl_is"}) for name in PROCESSES if "masked" not in name),
    ("hybrid", {"loss": "kl_is", "weight": "gidd_dynamic"}),
    ("uniform", {"loss": "kl_is", "weight": "log_snr"}),
    ("uniform", {"loss": "cross_entropy", "weight": "constant", "loss_positions": "all", "prediction": "full"}),
    *((name, {"loss": "score_entropy"}) for name in PROCESSES if "masked" in name or name == "uniform"),
    ("masked", {"weight": "cart"}),
    ("masked", {"loss": "finite_kl", "num_timesteps": 8, "exclude_mask_logit": False}),
    ("uniform", {"loss": "finite_kl", "num_timesteps": 8, "exclude_mask_logit": False}),
    ("uniform", {"loss": "kl_is", "exclude_mask_logit": False}),
    ("uniform", {"loss": "kl_is", "block_size": 4, "clean_attention": "token_causal", "autoregressive_weight": 0.5}),
    ("hybrid", {"loss": "finite_kl", "num_timesteps": 8, "block_size": 4, "shift": True, "autoregressive_weight": 0.5}),
]


def _config(process: str, given: dict) -> DiffusionConfig:
    return DiffusionConfig(num_noise_ids=VOCAB_SIZE, num_strata=8, t_min=0.01, t_max=0.99, **PROCESSES[process], **given)


def _reference(config: DiffusionConfig, rows, logits) -> torch.Tensor:
    process = noise_process(config)
    num = len(rows.inputs)
    values = reference_values(config, process, rows, logits[:num])
    # A row that is not trained has no loss, though its definition may be infinite or NaN there.
    total = (torch.where(rows.weights > 0, values, 0) * rows.weights.double())[rows.weights > 0].sum()
    cross_entropy = torch.nn.functional.cross_entropy(logits, rows.targets, reduction="none")
    return total + config.cross_entropy_weight * cross_entropy[:num].sum() + config.autoregressive_weight * cross_entropy[num:].sum()


@pytest.mark.parametrize(("process", "given"), CASES, ids=[f"{name} {given}" for name, given in CASES])
def test_the_gradient_is_that_of_the_definition(process, given):
    config = _config(process, given)
    objective = objective_of(config, 10)
    noisy = corrupt(packed_batch(range(6)), config, seed=5)
    rows = loss_rows(noisy, objective.weights(noisy))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((len(rows.targets), SIZE), generator=generator).requires_grad_()
    weight = torch.randn((VOCAB_SIZE, SIZE), generator=generator).mul_(0.5).requires_grad_()
    terms = objective.row_terms(rows)
    excluded = config.mask_token_id if config.exclude_mask_logit else None
    head = Head(Vocabulary(None, 0, excluded, "torch"), chunk_size=50, sum_row_gradients=False)
    values = linear_row_terms(hidden, weight, tuple(terms.values()), head)
    loss, sums = objective.loss(dict(zip(terms, values, strict=True)), rows)
    found = torch.autograd.grad(loss, (hidden, weight))
    wide_hidden, wide_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    logits = wide_hidden @ wide_weight.t()
    if excluded is not None:
        logits = logits.index_fill(1, torch.tensor([excluded]), -torch.inf)
    expected = _reference(config, rows, logits)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert objective.metrics(sums)["loss"] == pytest.approx(float(expected.detach()) / int(rows.num_tokens), rel=1e-5)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, (wide_hidden, wide_weight)), strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()

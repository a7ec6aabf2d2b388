"""The model: parameter counts, leaks, initial weights, and switches, built by megatron-core on one process."""

import math

import pytest
import torch

from tests.distributed import run_distributed
from tests.kernels.oracle import dense_term
from tests.slow import slow_except
from tests.tiny import LENGTH, VOCAB_SIZE, packed_batch, tiny_config
from w1train.config.compose import load_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt, corrupt_at  # noqa: E402
from w1train.engine.building import build_stage  # noqa: E402
from w1train.model.flops import num_parameters  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.model.row_terms import CrossEntropy, Entropy, LogProbabilities  # noqa: E402
from w1train.model.transformer import DiffusionTransformer  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

# The W1 count is that of the published 7.48 GB bf16 file; the LLaDA counts are in the paper's table (arXiv 2502.09992).
COUNTS = {
    "w1_4b": 3_739_097_600,
    "llada_8b": 8_015_581_184,
    "llada_1b": 1_487_243_264,
    "llada2_mini": 16_255_638_528,
    "llada2_flash": 102_889_697_280,
    "llada_moe_7b": 7_356_880_896,
    "rnd1_30b": 30_532_122_624,
}


def single_process(test):
    """Run the test's body in a forked process with a world of one: process groups must not outlive a test."""

    def run(*args, **kwargs):
        run_distributed(lambda _rank, _size: _inside(test, args, kwargs), 1, timeout=120, process_group=False)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.pytestmark = getattr(test, "pytestmark", [])
    return run


def _inside(test, args, kwargs):
    with distributed(tiny_config().parallel):
        test(*args, **kwargs)


def _model(config):
    return build_stage(config, transformer_config(config.model, config.parallel, config.training.precision))


def _awake(config, seed=0):
    """A model whose gates are open: at initialisation every layer is the identity, and nothing could leak."""
    model = _model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(params=slow_except(["w1_4b", "llada_8b", "llada_1b", "llada2_mini"], sorted(COUNTS)))
def recipe(request):
    return request.param


def test_parameter_counts(recipe):
    """Built from megatron-core's layers on the meta device: no weight is allocated."""

    @single_process
    def body():
        alone = ["parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=1", "parallel.expert=1"]
        config = load_config([f"recipe={recipe}", *alone])
        megatron = transformer_config(config.model, config.parallel, "bf16")
        with torch.device("meta"):
            model = DiffusionTransformer(megatron, config.model, mask_token_id=None)
        assert all(parameter.is_meta for parameter in model.parameters())
        assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[recipe]
        assert num_parameters(config.model) == COUNTS[recipe]

    body()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True},
        {"num_query_groups": 2},
        {"qkv_bias": True, "num_query_groups": 2},
        {"tie_embeddings": True},
        {"conditioning": "none"},
        {"kv_channels": None},
        {"qk_norm": True, "num_query_groups": 1, "tie_embeddings": True, "conditioning": "none"},
    ],
    ids=str,
)
def test_switches_give_the_closed_form_count_and_a_finite_loss(fields):
    @single_process
    def body():
        config = tiny_config(model=fields)
        model = _awake(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config.model)
        logits = model(rank_inputs(corrupt(packed_batch(range(3)), config.diffusion, 0), config).model)
        logits.logsumexp(dim=-1).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name

    body()


def _logits(model, config, noisy):
    """[b, l, v] at every position."""
    inputs = rank_inputs(noisy, config).model
    inputs.logit_positions = torch.arange(noisy.input_ids.numel())
    with torch.no_grad():
        return model(inputs).reshape(*noisy.input_ids.shape, VOCAB_SIZE)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("loss_chunk_size", [None, 7])
def test_the_head_answers_what_is_asked_of_its_logits(loss_chunk_size, tie_embeddings):
    """One term or several, with the logits in chunks or not."""

    @single_process
    def body():
        config = tiny_config(model={"tie_embeddings": tie_embeddings}, training={"loss_chunk_size": loss_chunk_size})
        model = _awake(config)
        inputs = rank_inputs(corrupt(packed_batch(range(3)), config.diffusion, 0), config).model
        logits = model(inputs).double()
        assert len(logits) % 7 > 0, "the last chunk is a short one"
        ids = (torch.arange(len(logits)) * 7) % config.diffusion.mask_token_id
        terms = (CrossEntropy(ids), LogProbabilities(torch.stack([ids, ids.flip(0)], dim=1)), Entropy())
        (alone,), together = model(inputs, terms[:1]), model(inputs, terms)
        for term, value in [(terms[0], alone), *zip(terms, together, strict=True)]:
            torch.testing.assert_close(value.double(), dense_term(term, logits), rtol=1e-5, atol=1e-5)

    body()


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_nothing_leaks_across_documents(timestep_per):
    """Change every token of one document: the logits of all others stay, bit for bit."""

    @single_process
    def body():
        config = tiny_config(diffusion={"timestep_per": timestep_per, "random_length_probability": 0.0})
        model = _awake(config)
        noisy = corrupt(packed_batch(range(6)), config.diffusion, 0)
        before = _logits(model, config, noisy)
        for document in range(int(noisy.document_ids.max()) + 1):
            changed = noisy.document_ids == document
            kept = noisy.input_ids
            noisy.input_ids = torch.where(changed, (kept - 16 + 7) % (VOCAB_SIZE - 16) + 16, kept)
            after = _logits(model, config, noisy)
            noisy.input_ids = kept
            others = (noisy.document_ids >= 0) & ~changed
            assert torch.equal(before[others], after[others])
            assert not torch.equal(before[changed], after[changed])

    body()


def test_a_pack_equals_its_documents_one_by_one():
    @single_process
    def body():
        config = tiny_config(diffusion={"random_length_probability": 0.0})
        model = _awake(config)
        noisy = corrupt_at(packed_batch([0, 2]), config.diffusion, 0, 0.5, draw=1)
        packed = _logits(model, config, noisy)
        for row in range(2):
            for document in noisy.document_ids[row][noisy.document_ids[row] >= 0].unique():
                places = (noisy.document_ids[row] == document).nonzero()[:, 0]
                alone = corrupt_at(packed_batch([[0, 2][row]]), config.diffusion, 0, 0.5, draw=1).at(places[None])
                alone.document_ids = torch.zeros((1, len(places)), dtype=torch.int32)
                torch.testing.assert_close(_logits(model, config, alone)[0], packed[row, places], rtol=1e-5, atol=1e-5)

    body()


def test_the_timestep_reaches_its_own_segment_only():
    @single_process
    def body():
        config = tiny_config(diffusion={"timestep_per": "document", "random_length_probability": 0.0})
        model = _awake(config)
        noisy = corrupt(packed_batch([0]), config.diffusion, 0)
        before = _logits(model, config, noisy)
        noisy.segment_timesteps[1] = (noisy.segment_timesteps[1] + 0.5) % 1
        after = _logits(model, config, noisy)
        of_segment = noisy.segment_index == 1
        assert torch.equal(before[~of_segment], after[~of_segment])
        assert not torch.isclose(before[of_segment], after[of_segment]).all()

    body()


def test_starts_as_a_uniform_predictor_that_never_says_mask():
    @single_process
    def body():
        config = tiny_config()
        logits = _logits(_model(config), config, corrupt(packed_batch(range(16)), config.diffusion, 0))
        assert torch.isinf(logits[..., config.diffusion.mask_token_id]).all()
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        assert float(entropy) == pytest.approx(math.log(VOCAB_SIZE - 1), rel=0.01)

    body()


def test_identity_adaln_is_the_model_without_conditioning():
    """adaln_init=identity: gates one, shift and scale zero, so an unconditioned checkpoint keeps its function."""

    @single_process
    def body():
        config, plain = tiny_config(model={"adaln_init": "identity"}), tiny_config(model={"conditioning": "none"})
        noisy = corrupt(packed_batch(range(4)), config.diffusion, 0)
        torch.testing.assert_close(_logits(_model(config), config, noisy), _logits(_model(plain), plain, noisy))

    body()


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_changes_no_gradient(recompute):
    @single_process
    def body():
        gradients = []
        for mode in ("none", recompute):
            config = tiny_config(parallel={"recompute": mode}, diffusion={"timestep_per": "document"})
            model = _awake(config)
            model(rank_inputs(corrupt(packed_batch(range(4)), config.diffusion, 0), config).model).logsumexp(dim=-1).sum().backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for name, gradient in gradients[0].items():
            # Full recomputation adds the layers' gradients of the condition in another order: rounding, no more.
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)

    body()


def test_length_is_free_at_inference():
    @single_process
    def body():
        config = tiny_config()
        model = _awake(config)
        noisy = corrupt_at(packed_batch(range(2), length=LENGTH - 9), config.diffusion, 0, 0.5, draw=1)
        assert _logits(model, config, noisy).shape == (2, LENGTH - 9, VOCAB_SIZE)

    body()

"""The layer of experts against its equations, and who may depend on whom in a model with experts."""

import itertools

import pytest
import torch

from tests.model.naive_experts import naive_layer
from tests.model.test_block_diffusion_model import _other, _outputs
from tests.model.test_transformer import _awake, single_process
from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.data.documents import block_bounds  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import build_stage  # noqa: E402
from w1train.model.experts.block_pools import RoutingBlocks, choose_in_pools  # noqa: E402
from w1train.model.experts.expert_layer import ExpertLayer  # noqa: E402
from w1train.model.experts.routed_tokens import RoutedTokens  # noqa: E402
from w1train.model.megatron_config import transformer_config  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

LING = {"num_active": 4, "score": "sigmoid", "scale": 2.5, "num_groups": 4, "num_active_groups": 2, "has_bias": True}
ROUTERS = {
    "ling": {**LING, "shared_ffn_hidden_size": 24},
    "sigmoid": {"num_active": 2, "score": "sigmoid"},
    "qwen": {"num_active": 3},
    "llada-moe": {"num_active": 3, "normalize": False, "scale": 1.5},
    "top-1": {"num_active": 1},
}


def _config(**experts):
    config = tiny_config(diffusion={"random_length_probability": 0.0, "block_size": 8}, training={"micro_batch_size": 2})
    for name, value in {"num_experts": 8, "num_active": 2, "ffn_hidden_size": 16, **experts}.items():
        setattr(config.model.experts, name, value)
    return config


def _layer(config):
    """An awake layer of experts with a bias."""
    stage = build_stage(config, transformer_config(config.model, config.parallel, "fp32"))
    layer = stage.decoder.layers[-1].mlp
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [*layer.parameters(), *([layer.router.expert_bias] if config.model.experts.has_bias else [])]:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return layer


def _rows(seed=1):
    return torch.randn((20, 2, 32), generator=torch.Generator().manual_seed(seed))


def _errors(found, expected):
    return [float((a - b).norm() / b.norm().clamp_min(1e-20)) for a, b in zip(found, expected, strict=True)]


def test_equals_its_equations():
    """Outputs, and the gradients of tokens, router, experts and shared expert, in a graph that has nothing of the layer."""

    @single_process
    def body():
        for name, router in ROUTERS.items():
            config = _config(**router)
            layer, results = _layer(config), []
            for forward in (ExpertLayer.forward, naive_layer(config.model.experts)):
                rows = _rows().requires_grad_()
                output = forward(layer, rows)[0]
                values = [rows, *layer.parameters()]
                results.append([output, *torch.autograd.grad((output * _rows(2)).sum(), values)])
            assert max(_errors(*results)) < 2e-6, (name, _errors(*results))

    body()


def test_one_expert_and_equal_experts_are_a_dense_layer():
    """A single expert has weight 1; the weights of equal experts add up to 1."""

    @single_process
    def body():
        dense = _layer(_config(num_experts=1, num_active=1)).experts
        weights = dense.linear_fc1.weight[0], dense.linear_fc2.weight[0]
        rows = _rows()
        gate, up = (rows @ weights[0].flatten(0, 1).T).chunk(2, dim=-1)
        expected = (torch.nn.functional.silu(gate) * up) @ weights[1].T
        for router in ({"num_experts": 1, "num_active": 1}, {"num_active": 3}, {"num_active": 2, "score": "sigmoid"}):
            layer = _layer(_config(**router))
            with torch.no_grad():
                layer.experts.linear_fc1.weight.copy_(weights[0])
                layer.experts.linear_fc2.weight.copy_(weights[1])
            assert _errors([layer(rows)[0]], [expected])[0] < 1e-6, router

    body()


def test_the_order_of_experts_and_of_tokens_means_nothing():
    @single_process
    def body():
        config = _config(num_active=2, score="sigmoid", has_bias=True)
        layer, rows = _layer(config), _rows()
        expected = layer(rows)[0]
        tokens, order = torch.randperm(20), torch.randperm(8)
        assert _errors([layer(rows[tokens])[0]], [expected[tokens]])[0] < 1e-6
        with torch.no_grad():
            for value in (*layer.experts.parameters(), layer.router.weight, layer.router.expert_bias):
                value.copy_(value[order].clone())
        assert _errors([layer(rows)[0]], [expected])[0] < 1e-6

    body()


@pytest.mark.parametrize("block_index", ["document", "sample"])
def test_pools_are_those_of_brute_force(block_index):
    """The experts of each token, from sets of tokens that are in one block, document, sample and stream."""
    config = _config(num_active=2, pool_per_block=3)
    config.diffusion.block_index = block_index
    noisy = corrupt(packed_batch([1, 2, 3]), config.diffusion, 0)
    blocks = rank_inputs(noisy, config).model.routing_blocks
    scores = torch.randn((*blocks.index.shape, 8), generator=torch.Generator().manual_seed(0))
    chosen = choose_in_pools(scores.flatten(0, 1), blocks, 3, 2, None).view(*blocks.index.shape, 2)
    starts, _ = block_bounds(noisy.document_ids, 8, block_index)
    length, members = noisy.document_ids.shape[1], {}
    for sample, column in itertools.product(*map(range, blocks.index.shape)):
        place = column % length
        name = (sample, column // length, int(noisy.document_ids[sample, place]), int(starts[sample, place]))
        members.setdefault(name, []).append((sample, column))
    assert len(members) == len(blocks.index.unique()) > 20
    for tokens in members.values():
        pool = set(torch.stack([scores[token] for token in tokens]).amax(dim=0).argsort(descending=True)[:3].tolist())
        for token in tokens:
            best = [expert for expert in scores[token].argsort(descending=True).tolist() if expert in pool]
            assert chosen[token].tolist() == best[:2]


def test_router_and_experts_do_not_wait_for_the_device():
    """Meta tensors have no numbers: whatever reads a number of the device raises an error."""

    @single_process
    def body():
        config = _config(num_active=2, score="sigmoid", has_bias=True, pool_per_block=3)
        with torch.device("meta"):
            stage = build_stage(config, transformer_config(config.model, config.parallel, "fp32"))
            layer = stage.decoder.layers[-1].mlp.to("meta")
            rows = torch.empty((20, 2, 32), requires_grad=True)
            index = torch.empty((20, 2), dtype=torch.int64)
            tokens = RoutedTokens(torch.empty((20, 2), dtype=torch.uint8), None, RoutingBlocks(index, 40))
            weights, _ = layer.router(rows, tokens)
            output, _ = layer.experts(torch.empty(80, 32), torch.empty(8, dtype=torch.int64), torch.empty(80))
            (weights.sum() + output.sum()).backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())

    body()


@pytest.mark.parametrize("router_precision", ["fp32", "model"])
def test_router_computes_bf16_tokens_in_its_own_precision(router_precision):
    """Logits that are rounded to bf16 choose other experts. The bias and the counts are too fine for bf16 in any case."""

    @single_process
    def body():
        config = _config(**LING, router_precision=router_precision)
        stage = build_stage(config, transformer_config(config.model, config.parallel, "bf16"))
        router, rows = stage.decoder.layers[-1].mlp.router, _rows().bfloat16()
        assert router.weight.dtype == torch.bfloat16
        assert router.expert_bias.dtype == torch.float32
        assert router.counts.dtype == router.losses.dtype == torch.float64
        logits = router.gating(rows)
        exact = rows.double() @ router.weight.double().T
        assert logits.dtype == {"fp32": torch.float32, "model": torch.bfloat16}[router_precision]
        assert (_errors([logits.double()], [exact])[0] < 1e-6) == (router_precision == "fp32")

    body()


def _changed(before, after):
    """The positions at which the outputs have changed, bool [b, l], beyond what products of other sizes round. The logit of the mask
    token is -infinity."""
    before, after = (logits.masked_fill(logits.isinf(), 0) for logits in (before, after))
    change = (after - before).abs().amax(dim=2) / before.abs().amax()
    assert not ((change > 1e-5) & (change < 1e-4)).any(), "a change is large, or it is rounding"
    return change >= 1e-4


DEPENDENCE = {
    "ling": ROUTERS["ling"],
    "qwen": ROUTERS["qwen"],
    "pools": {"num_active": 2, "score": "sigmoid", "has_bias": True, "pool_per_block": 3},
}


@pytest.mark.parametrize("router", DEPENDENCE)
def test_who_depends_on_whom(router):
    """The clean stream does not depend on the noise, and a document not on its neighbours, although they share experts."""

    @single_process
    def body():
        config = _config(**DEPENDENCE[router])
        model = _awake(config)
        noisy = corrupt(packed_batch([1, 2]), config.diffusion, 0)
        before = _outputs(model, config, noisy)
        kept, clean = noisy.input_ids.clone(), noisy.tokens.clone()
        noisy.input_ids[:] = _other(kept)
        after = _outputs(model, config, noisy)
        assert _changed(before[0], after[0])[noisy.document_ids >= 0].all()
        assert not _changed(before[1], after[1]).any()
        is_first = noisy.document_ids == noisy.document_ids[:, :1]
        noisy.input_ids[:] = torch.where(is_first, _other(kept), kept)
        noisy.tokens[:] = torch.where(is_first, _other(clean), clean)
        after = _outputs(model, config, noisy)
        for old, new in zip(before, after, strict=True):
            assert torch.equal(_changed(old, new), is_first)

    body()

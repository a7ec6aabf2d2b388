"""Import of weights from transformers: the same function under every layout, each parameter once, and no unnecessary reads."""

import dataclasses

import pytest
import torch

from tests.conversion.tiny_models import (
    CASES,
    LAYOUTS,
    VOCAB_SIZE,
    build,
    causal_logits,
    config_for,
    imported_logits,
    imported_tensors,
    logits,
    make,
    on_ranks,
    step_of_nothing,
)
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train.conversion.initial_weights import InitialWeights
from w1train.conversion.sources import SafetensorsDirectory
from w1train.conversion.tensors import shapes
from w1train.engine.building import build_trained_model
from w1train.model.initialization import global_named_parameters


@pytest.fixture(scope="module", params=sorted(CASES))
def imported(request, tmp_path_factory):
    """Return (directory, causal logits of transformers)."""
    directory = tmp_path_factory.mktemp(request.param)
    return directory, causal_logits(make(request.param, directory))


@pytest.mark.parametrize("parallel", slow_except([{}, {"tensor": 2, "pipeline": 2}], LAYOUTS), ids=str)
def test_causal_logits_are_those_of_transformers(imported, parallel):
    directory, expected = imported
    assert expected.std() > 0.5
    for found in on_ranks(imported_logits, config_for(directory, parallel=parallel)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_adaln_is_added_without_a_change(tmp_path):
    expected = causal_logits(make("qwen3", tmp_path))
    config = config_for(tmp_path, model={"conditioning": "adaln", "adaln_init": "identity"}, parallel={"tensor": 2, "pipeline": 2})
    for found in on_ranks(imported_logits, config):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_master_weights_are_the_imported_ones(tmp_path, precision):
    """A step that changes nothing keeps the imported weights; masters made before the import would bring back the random weights."""
    make("qwen2", tmp_path)
    config = config_for(tmp_path, training={"precision": precision})

    def step(config):
        model = build(config)
        before = [parameter.detach().clone() for parameter in model.stages[0].parameters()]
        step_of_nothing(model)
        return all(torch.equal(old, new) for old, new in zip(before, model.stages[0].parameters(), strict=True))

    assert on_ranks(step, config) == [True]


def test_each_rank_reads_its_slices_and_all_ranks_together_read_everything_once(tmp_path):
    make("qwen2", tmp_path)
    config = config_for(tmp_path, parallel={"tensor": 2, "pipeline": 2})

    def reads(config):
        weights, sizes = InitialWeights(config), []
        source = weights.stored.source
        read = source.read
        source.read = lambda name, box: (sizes.append((name, tuple(part.stop - part.start for part in box))), read(name, box))[1]
        model = build_trained_model(config, weights.load)
        largest = max(parameter.numel() for parameter in model.stages[0].parameters())
        assert all(torch.Size(size).numel() <= largest for _, size in sizes)
        return sizes

    ranks = on_ranks(reads, config)
    total = {}
    for sizes in ranks:
        assert len({name for name, _ in sizes}) == len(sizes)
        for name, size in sizes:
            total[name] = total.get(name, 0) + torch.Size(size).numel()
    whole = SafetensorsDirectory(tmp_path).tensors
    for name, shape in whole.items():
        # Norms are on both tensor-parallel ranks, and the tied embedding is on the first and the last stage.
        copies = 2 if "norm" in name or "embed" in name else 1
        assert total[name] == copies * torch.Size(shape).numel(), name
    assert total.keys() == whole.keys()


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"qkv_bias": True, "num_query_groups": 2}, {"tie_embeddings": True}], ids=str)
@pytest.mark.parametrize("conditioning", ["adaln", "none"])
def test_listed_shapes_are_those_of_the_built_model(fields, conditioning):
    def built(config):
        return {name: tuple(parameter.shape) for name, parameter in global_named_parameters(build_trained_model(config).stages[0])}

    config = tiny_config(model={**fields, "conditioning": conditioning})
    assert on_ranks(built, config) == [shapes(config.model)]


NUM_NEW = 8


@pytest.fixture(scope="module")
def enlarged(tmp_path_factory):
    """Return (directory, its embedding and head, whole tensors of a model with more rows)."""
    directory = tmp_path_factory.mktemp("enlarged")
    model = make("llama", directory)
    config = config_for(directory, model={"vocab_size": VOCAB_SIZE + NUM_NEW}, diffusion={"mask_token_id": VOCAB_SIZE})
    tensors = on_ranks(imported_tensors, config)[0]
    return config, model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach(), tensors


def test_new_rows_are_like_the_others(enlarged):
    """The row of the mask is the mean row plus noise, with an ordinary norm (the gradient of a row with a small norm would explode). A new
    token gets no more of the softmax than an average token."""
    _, embedding, head, tensors = enlarged
    rows, head_rows = tensors["embedding.word_embeddings.weight"], tensors["output_layer.weight"]
    assert torch.equal(rows[:VOCAB_SIZE], embedding)
    assert torch.equal(head_rows[:VOCAB_SIZE], head)
    new, norms = rows[VOCAB_SIZE:], embedding.norm(dim=1)
    assert (new.norm(dim=1) > 0.6 * norms.mean()).all()
    assert (new.norm(dim=1) < 1.6 * norms.mean()).all()
    assert len(new.unique(dim=0)) == NUM_NEW
    assert (new.mean(dim=0) - embedding.mean(dim=0)).norm() < 3 * norms.mean() / NUM_NEW**0.5
    torch.testing.assert_close(head_rows[VOCAB_SIZE:], head.mean(dim=0).expand(NUM_NEW, -1), rtol=1e-6, atol=1e-7)
    hidden = torch.randn(50, head.shape[1], generator=torch.Generator().manual_seed(0)) * 3
    shares = (hidden @ head_rows.T).softmax(dim=1)
    assert (shares[:, VOCAB_SIZE:] <= shares[:, :VOCAB_SIZE].mean(dim=1, keepdim=True) + 1e-7).all()


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_new_rows_are_the_same_under_every_layout(enlarged, parallel):
    config, _, _, tensors = enlarged
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))
    for name, tensor in on_ranks(imported_tensors, config)[0].items():
        assert torch.equal(tensor, tensors[name]), name


def test_a_tied_new_row_is_one_row_on_both_ends(tmp_path):
    make("qwen2", tmp_path)
    config = config_for(tmp_path, model={"vocab_size": VOCAB_SIZE + 8}, parallel={"tensor": 2, "pipeline": 2})

    def ends(config):
        return [parameter.data.clone() for name, parameter in global_named_parameters(build(config).stages[0]) if "embeddings" in name]

    first, second, third, fourth = (tensors[0] for tensors in on_ranks(ends, config))
    assert torch.equal(first, third)
    assert torch.equal(second, fourth)


def test_a_reused_id_keeps_its_row(tmp_path):
    model = make("llama", tmp_path)
    tensors = on_ranks(imported_tensors, config_for(tmp_path, diffusion={"mask_token_id": 5}))[0]
    assert torch.equal(tensors["embedding.word_embeddings.weight"], model.model.embed_tokens.weight)


def test_causal_and_bidirectional_differ(tmp_path):
    """The oracle of this file can fail: another mask gives other logits."""
    expected = causal_logits(make("llama", tmp_path))
    (found,) = on_ranks(lambda config: logits(config, build(config), causal=False), config_for(tmp_path))
    assert (found - expected).abs().max() > 0.1

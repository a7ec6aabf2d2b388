"""Closed-form FLOPs against torch's counter on a plain replica, and parameter counts against the published models."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_config
from w1train.config.compose import load_config
from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import AdaptersConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.model.flops import FlopsByPart, linear_sizes, model_flops, num_active_parameters, num_expert_layers, num_parameters

W1_4B = ModelConfig(vocab_size=64512, num_layers=48, hidden_size=2048, num_attention_heads=24, kv_channels=128, ffn_hidden_size=7168)
LLADA_8B = ModelConfig(
    vocab_size=126464, num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=12288, conditioning="none"
)
LLADA_1B = ModelConfig(
    vocab_size=126464,
    num_layers=22,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=4,
    ffn_hidden_size=5634,
    conditioning="none",
)
SMALL = tiny_config(
    model={"vocab_size": 97, "hidden_size": 24, "num_query_groups": 2, "kv_channels": 10, "ffn_hidden_size": 40, "qk_norm": True}
    | {"condition_size": 12, "timestep_frequency_size": 8}
).model
VARIANTS = {
    "gqa_adaln": SMALL,
    "mha_default_channels": replace(SMALL, num_query_groups=None, kv_channels=None, qk_norm=False),
    "tied": replace(SMALL, tie_embeddings=True),
    "no_conditioning": replace(SMALL, conditioning="none"),
    "experts": replace(
        SMALL,
        num_layers=3,
        experts=ExpertsConfig(num_experts=6, num_active=2, ffn_hidden_size=14, shared_ffn_hidden_size=20, num_dense_layers=1),
    ),
    "experts_alone": replace(SMALL, experts=ExpertsConfig(num_experts=5, num_active=3, ffn_hidden_size=8)),
}


def test_w1_4b_parameters():
    """The published model, its parts counted by hand."""
    attention = 3 * 2048 * 3072 + 3072 * 2048
    layer = attention + 3 * 2048 * 7168 + 2 * 2048 + (256 * 12288 + 12288)
    ends = 2 * 64512 * 2048 + 2048 + (256 * 4096 + 4096) + 2 * (256 * 256 + 256)
    assert num_parameters(W1_4B) == 48 * layer + ends == 3_739_097_600


def test_llada_parameters():
    """arXiv 2502.09992: 8.0156B and 1.4872B, and without both embeddings 6.9796B and 0.9692B."""
    layer_8b = 4 * 4096 * 4096 + 3 * 4096 * 12288 + 2 * 4096
    assert num_parameters(LLADA_8B) == 2 * 126464 * 4096 + 32 * layer_8b + 4096 == 8_015_581_184
    layer_1b = 2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5634 + 2 * 2048
    assert num_parameters(LLADA_1B) == 2 * 126464 * 2048 + 22 * layer_1b + 2048 == 1_487_243_264


@pytest.mark.parametrize(
    ("recipe", "total", "both_tables", "one_table", "no_table"),
    [
        ("llada2_mini", 16_255_638_528, 1.433, 1.111, 0.789),
        ("llada2_flash", 102_889_697_280, 6.152, 5.508, 4.865),
        ("llada_moe_7b", 7_356_880_896, 1.720, 1.398, 1.076),
        ("rnd1_30b", 30_532_122_624, 3.353, 3.042, 2.731),
        ("sdar_30b", 30_532_122_624, 3.353, 3.042, 2.731),
    ],
)
def test_mixtures_of_experts_have_the_published_numbers_of_parameters(recipe, total, both_tables, one_table, no_table):
    """All parameters, and the billions that compute a token: Ling publishes 1.4 with both tables of the vocabulary and 0.789 without them,
    LLaDA-MoE 1.4 without the input's table."""
    model = load_config([f"recipe={recipe}"]).model
    table = model.vocab_size * model.hidden_size
    assert num_parameters(model) == total
    found = [round((num_active_parameters(model) - tables * table) / 1e9, 3) for tables in (0, 1, 2)]
    assert found == [both_tables, one_table, no_table]


@pytest.mark.parametrize(("recipe", "published"), [("llada2_mini", 4.735e9), ("llada2_flash", 2.919e10)])
def test_a_routed_token_takes_six_flops_of_each_parameter_that_computes_it(recipe, published):
    """Without the head. Norms have parameters and no products, which is the difference."""
    model = load_config([f"recipe={recipe}"]).model
    flops = model_flops(model, num_tokens=1, visible_pairs=0, num_logits=0, num_segments=1).total
    assert flops == pytest.approx(published, rel=3e-4)
    norms = model.num_layers * (2 * model.hidden_size + 2 * 128) + model.hidden_size
    assert flops == 6 * (num_active_parameters(model) - 2 * model.vocab_size * model.hidden_size - norms)


@pytest.mark.parametrize("num_experts", [0, 4])
def test_more_dense_layers_than_layers_leave_no_layer_with_experts(num_experts):
    dense = replace(SMALL, experts=ExpertsConfig(num_experts=num_experts, num_active=1, num_dense_layers=7))
    assert num_expert_layers(dense) == 0
    assert num_parameters(dense) == num_active_parameters(dense) == num_parameters(SMALL)


class Replica(nn.Module):
    """The model's matrix products in plain torch, one attribute per part; adaLN once per segment."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.channels = model.kv_channels or model.hidden_size // model.num_attention_heads
        self.num_groups = model.num_query_groups or model.num_attention_heads
        hidden, condition = model.hidden_size, model.condition_size
        self.embedding = nn.Embedding(model.vocab_size, hidden)
        first = model.num_layers - num_expert_layers(model)
        self.layers = nn.ModuleList(self.build_layer(has_experts=layer >= first) for layer in range(model.num_layers))
        self.final_norm = nn.RMSNorm(hidden)
        self.output_head = nn.Linear(hidden, model.vocab_size, bias=False)
        if model.tie_embeddings:
            self.output_head.weight = self.embedding.weight
        if model.conditioning == "adaln":
            self.timestep_mlp = nn.Sequential(
                nn.Linear(model.timestep_frequency_size, condition), nn.SiLU(), nn.Linear(condition, condition)
            )
            self.final_modulation = nn.Linear(condition, 2 * hidden)

    def build_layer(self, *, has_experts: bool) -> nn.ModuleDict:
        hidden, experts = self.model.hidden_size, self.model.experts
        query_size, key_value_size = self.model.num_attention_heads * self.channels, self.num_groups * self.channels
        layer = nn.ModuleDict(
            {
                "query_key_value": nn.Linear(hidden, query_size + 2 * key_value_size, bias=False),
                "projection": nn.Linear(query_size, hidden, bias=False),
                "norms": nn.ModuleList([nn.RMSNorm(hidden), nn.RMSNorm(hidden)]),
            }
        )
        if has_experts:
            layer["router"] = nn.Linear(hidden, experts.num_experts, bias=False)
            layer["experts"] = nn.ModuleList(Swiglu(hidden, experts.ffn_hidden_size) for _ in range(experts.num_experts))
            if experts.shared_ffn_hidden_size:
                layer["shared_experts"] = Swiglu(hidden, experts.shared_ffn_hidden_size)
        else:
            layer["mlp"] = Swiglu(hidden, self.model.ffn_hidden_size)
        if self.model.qk_norm:
            layer["qk_norms"] = nn.ModuleList([nn.RMSNorm(self.channels), nn.RMSNorm(self.channels)])
        if self.model.conditioning == "adaln":
            layer["modulation"] = nn.Linear(self.model.condition_size, 6 * hidden)
        return layer


class Swiglu(nn.Module):
    """The three matrices of an MLP or of an expert."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def count(*outputs_of) -> int:
    """FLOPs of the functions' forward and backward passes."""
    with FlopCounterMode(display=False) as counter:
        for function in outputs_of:
            output = function().sum()
            if output.requires_grad:
                output.backward()
    return counter.get_total_flops()


def measured_flops(
    model: ModelConfig, num_samples: int, length: int, num_logits: int, num_segments: int, *, is_frozen: bool = False
) -> FlopsByPart:
    replica = Replica(model).requires_grad_(not is_frozen)
    has_adaln = model.conditioning == "adaln"
    hidden = torch.randn(num_samples * length, model.hidden_size, requires_grad=True)
    inner = torch.randn(num_samples * length, model.num_attention_heads * replica.channels, requires_grad=True)
    condition = torch.randn(num_segments, model.condition_size, requires_grad=not is_frozen)
    sinusoid = torch.randn(num_segments, model.timestep_frequency_size)  # a function of t alone: takes no gradient
    query, key, value = (
        torch.randn(num_samples * model.num_attention_heads, length, replica.channels, requires_grad=True) for _ in range(3)
    )

    def attention() -> torch.Tensor:
        return torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(dim=-1), value)

    def layers_with(part: str) -> list[nn.ModuleDict]:
        return [layer for layer in replica.layers if part in layer]

    def routed(layer: nn.ModuleDict) -> torch.Tensor:
        """Give each token to num_active experts, most of them to the first."""
        num_active = model.experts.num_active
        rows = hidden.repeat_interleave(num_active, dim=0).split([len(hidden) * num_active - 1, *[0] * (len(layer["experts"]) - 2), 1])
        return torch.cat([expert(rows_of_expert) for expert, rows_of_expert in zip(layer["experts"], rows, strict=True)])

    modulations = [layer["modulation"] for layer in replica.layers] + [replica.final_modulation] if has_adaln else []
    return FlopsByPart(
        attention_projections=sum(
            count(lambda layer=layer: layer["query_key_value"](hidden), lambda layer=layer: layer["projection"](inner))
            for layer in replica.layers
        ),
        attention_core=count(*[attention] * model.num_layers),
        mlp=sum(count(lambda layer=layer: layer["mlp"](hidden)) for layer in layers_with("mlp")),
        router=sum(count(lambda layer=layer: layer["router"](hidden)) for layer in layers_with("router")),
        experts=sum(count(lambda layer=layer: routed(layer)) for layer in layers_with("experts")),
        shared_experts=sum(count(lambda layer=layer: layer["shared_experts"](hidden)) for layer in layers_with("shared_experts")),
        adaln=sum(count(lambda linear=linear: linear(condition)) for linear in modulations),
        timestep_mlp=count(lambda: replica.timestep_mlp(sinusoid)) if has_adaln else 0,
        output_head=count(lambda: replica.output_head(hidden[:num_logits])),
        adapters=0,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_equal_what_torch_counts(variant):
    model = VARIANTS[variant]
    num_samples, length, num_logits, num_segments = 2, 13, 9, 3
    expected = measured_flops(model, num_samples, length, num_logits, num_segments)
    formula = model_flops(
        model, num_tokens=num_samples * length, visible_pairs=num_samples * length**2, num_logits=num_logits, num_segments=num_segments
    )
    assert formula == expected
    assert formula.total == sum(getattr(expected, part) for part in FlopsByPart.__slots__)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_more_forward_pass_has_two_flops_of_each_product(variant):
    work = {"num_tokens": 26, "visible_pairs": 338, "num_logits": 9, "num_segments": 3}
    once, twice = (model_flops(VARIANTS[variant], **work, num_measuring_passes=number) for number in (0, 1))
    for part in set(FlopsByPart.__slots__) - {"timestep_mlp"}:
        assert 3 * getattr(twice, part) == 4 * getattr(once, part), part
    condition, frequencies = VARIANTS[variant].condition_size, VARIANTS[variant].timestep_frequency_size
    of_forward = 2 * 3 * condition * (frequencies + condition) if once.timestep_mlp else 0
    assert twice.timestep_mlp - once.timestep_mlp == of_forward


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_equal_a_built_model(variant):
    model = VARIANTS[variant]
    assert num_parameters(model) == sum(parameter.numel() for parameter in Replica(model).parameters())


def test_w1_4b_flops_are_near_six_per_parameter_and_token():
    """All of it but the embedding look-up (no product) and adaLN (per segment) is used once by every token."""
    length = 4096
    flops = model_flops(W1_4B, num_tokens=length, visible_pairs=0, num_logits=length, num_segments=1)
    per_token = num_parameters(W1_4B) - 64512 * 2048 - 48 * (256 * 12288 + 12288)
    assert flops.total == pytest.approx(6 * per_token * length, rel=2e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frozen_base_takes_no_gradients_of_weights(variant):
    """Without gradients of the base, adaLN has only its forward pass: neither its weights nor the timestep want a gradient."""
    model, adapters = VARIANTS[variant], AdaptersConfig(rank=3)
    num_samples, length, num_logits, num_segments = 2, 13, 9, 3
    expected = measured_flops(model, num_samples, length, num_logits, num_segments, is_frozen=True)
    hidden = torch.randn(num_samples * length, 1)
    pairs = [
        nn.Sequential(nn.Linear(size.inputs, 3, bias=False), nn.Linear(3, size.outputs, bias=False))
        for size in linear_sizes(model).values()
        for _ in range(size.num_layers)
    ]
    of_adapters = sum(count(lambda pair=pair: pair(hidden.expand(-1, pair[0].in_features).clone().requires_grad_())) for pair in pairs)
    formula = model_flops(
        model,
        num_tokens=num_samples * length,
        visible_pairs=num_samples * length**2,
        num_logits=num_logits,
        num_segments=num_segments,
        adapters=adapters,
    )
    assert formula == replace(expected, adapters=of_adapters)
    num_of_pairs = sum(parameter.numel() for pair in pairs for parameter in pair.parameters())
    assert num_parameters(model, adapters) - num_parameters(model) == num_of_pairs


def test_parameters_that_are_trained_beside_adapters_have_gradients():
    """With the head and the modulations trained, the head takes three products again, and the modulations two."""
    work = {"num_tokens": 7, "visible_pairs": 9, "num_logits": 5, "num_segments": 2}
    whole, frozen = model_flops(SMALL, **work), model_flops(SMALL, **work, adapters=AdaptersConfig(rank=1))
    adapters = AdaptersConfig(rank=1, train=["output_layer.weight", "*layers.1.modulation.*"])
    found = model_flops(SMALL, **work, adapters=adapters)
    assert (found.output_head, found.adaln) == (whole.output_head, whole.adaln // 3 * 2)
    assert found.mlp == frozen.mlp == whole.mlp // 3 * 2

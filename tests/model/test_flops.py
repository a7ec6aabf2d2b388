"""Closed-form FLOPs against torch's counter on a plain replica, and parameter counts against the published models."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_config
from w1train.config.schema import ModelConfig
from w1train.model.flops import FlopsByPart, model_flops, num_parameters

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


class Replica(nn.Module):
    """The model's matrix products in plain torch, one attribute per part; adaLN once per segment."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model = model
        self.channels = model.kv_channels or model.hidden_size // model.num_attention_heads
        self.num_groups = model.num_query_groups or model.num_attention_heads
        hidden, condition = model.hidden_size, model.condition_size
        self.embedding = nn.Embedding(model.vocab_size, hidden)
        self.layers = nn.ModuleList(self.build_layer() for _ in range(model.num_layers))
        self.final_norm = nn.RMSNorm(hidden)
        self.output_head = nn.Linear(hidden, model.vocab_size, bias=False)
        if model.tie_embeddings:
            self.output_head.weight = self.embedding.weight
        if model.conditioning == "adaln":
            self.timestep_mlp = nn.Sequential(
                nn.Linear(model.timestep_frequency_size, condition), nn.SiLU(), nn.Linear(condition, condition)
            )
            self.final_modulation = nn.Linear(condition, 2 * hidden)

    def build_layer(self) -> nn.ModuleDict:
        hidden, ffn = self.model.hidden_size, self.model.ffn_hidden_size
        query_size, key_value_size = self.model.num_attention_heads * self.channels, self.num_groups * self.channels
        layer = nn.ModuleDict(
            {
                "query_key_value": nn.Linear(hidden, query_size + 2 * key_value_size, bias=False),
                "projection": nn.Linear(query_size, hidden, bias=False),
                "gate_up": nn.Linear(hidden, 2 * ffn, bias=False),
                "down": nn.Linear(ffn, hidden, bias=False),
                "norms": nn.ModuleList([nn.RMSNorm(hidden), nn.RMSNorm(hidden)]),
            }
        )
        if self.model.qk_norm:
            layer["qk_norms"] = nn.ModuleList([nn.RMSNorm(self.channels), nn.RMSNorm(self.channels)])
        if self.model.conditioning == "adaln":
            layer["modulation"] = nn.Linear(self.model.condition_size, 6 * hidden)
        return layer


def count(*outputs_of) -> int:
    """FLOPs of the functions' forward and backward passes."""
    with FlopCounterMode(display=False) as counter:
        for function in outputs_of:
            function().sum().backward()
    return counter.get_total_flops()


def measured_flops(model: ModelConfig, num_samples: int, length: int, num_logits: int, num_segments: int) -> FlopsByPart:
    replica = Replica(model)
    has_adaln = model.conditioning == "adaln"
    hidden = torch.randn(num_samples * length, model.hidden_size, requires_grad=True)
    inner = torch.randn(num_samples * length, model.num_attention_heads * replica.channels, requires_grad=True)
    condition = torch.randn(num_segments, model.condition_size, requires_grad=True)
    sinusoid = torch.randn(num_segments, model.timestep_frequency_size)  # a function of t alone: takes no gradient
    query, key, value = (
        torch.randn(num_samples * model.num_attention_heads, length, replica.channels, requires_grad=True) for _ in range(3)
    )

    def attention() -> torch.Tensor:
        return torch.bmm(torch.bmm(query, key.transpose(1, 2)).softmax(dim=-1), value)

    def mlp(layer: nn.ModuleDict) -> torch.Tensor:
        gate, up = layer["gate_up"](hidden).chunk(2, dim=-1)
        return layer["down"](nn.functional.silu(gate) * up)

    modulations = [layer["modulation"] for layer in replica.layers] + [replica.final_modulation] if has_adaln else []
    return FlopsByPart(
        attention_projections=sum(
            count(lambda layer=layer: layer["query_key_value"](hidden), lambda layer=layer: layer["projection"](inner))
            for layer in replica.layers
        ),
        attention_core=count(*[attention] * model.num_layers),
        mlp=sum(count(lambda layer=layer: mlp(layer)) for layer in replica.layers),
        adaln=sum(count(lambda linear=linear: linear(condition)) for linear in modulations),
        timestep_mlp=count(lambda: replica.timestep_mlp(sinusoid)) if has_adaln else 0,
        output_head=count(lambda: replica.output_head(hidden[:num_logits])),
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
def test_parameters_equal_a_built_model(variant):
    model = VARIANTS[variant]
    assert num_parameters(model) == sum(parameter.numel() for parameter in Replica(model).parameters())


def test_w1_4b_flops_are_near_six_per_parameter_and_token():
    """All of it but the embedding look-up (no product) and adaLN (per segment) is used once by every token."""
    length = 4096
    flops = model_flops(W1_4B, num_tokens=length, visible_pairs=0, num_logits=length, num_segments=1)
    per_token = num_parameters(W1_4B) - 64512 * 2048 - 48 * (256 * 12288 + 12288)
    assert flops.total == pytest.approx(6 * per_token * length, rel=2e-3)

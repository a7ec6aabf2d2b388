"""FlexAttention: the block mask is the mask, tile by tile; outputs on the CPU, where torch has no backward of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from tests.attention.cases import VARIANTS, inputs_of, long_pack, visibilities
from tests.distributed import run_distributed
from tests.slow import examples
from w1train.attention.backends import flex
from w1train.attention.backends.flex import FlexBackend, interval_block_mask
from w1train.attention.backends.reference import attend_reference
from w1train.config.rules.attention_limits import AttentionCase

INTERVAL_KINDS = tuple(name for name in VARIANTS if name != "scattered")


def _expected_tiles(mask, tile):
    """(seen in part, seen wholly) of the dense mask, bool [b, i, j] each; what sticks out over the mask is not visible."""
    num_rows, num_keys = mask.shape[1:]
    padded = torch.nn.functional.pad(mask, (0, -num_keys % tile, 0, -num_rows % tile))
    tiles = padded.unflatten(2, (-1, tile)).unflatten(1, (-1, tile)).transpose(2, 3).flatten(3)
    return tiles.any(-1) & ~tiles.all(-1), tiles.all(-1)


def _listed(counts, indices):
    """A block mask's lists as bool [b, i, j]; what stands behind the count is not listed."""
    tiles = torch.zeros(indices.shape, dtype=torch.bool)
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return tiles.scatter(-1, indices.long(), listed)[:, 0]


@given(visibilities(kinds=INTERVAL_KINDS), st.sampled_from([1, 4, 16, 128]))
@settings(max_examples=examples(60))
def test_block_mask_is_the_dense_mask(kind_and_visibility, tile):
    _, visibility = kind_and_visibility
    mask = visibility.dense()
    partial, full = _expected_tiles(mask, tile)
    block_mask = interval_block_mask(visibility, tile)
    assert torch.equal(_listed(block_mask.kv_num_blocks, block_mask.kv_indices), partial)
    assert torch.equal(_listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices), full)
    assert torch.equal(_listed(block_mask.q_num_blocks, block_mask.q_indices), partial.transpose(1, 2))
    assert torch.equal(_listed(block_mask.full_q_num_blocks, block_mask.full_q_indices), full.transpose(1, 2))
    sample, row, key = torch.meshgrid(*(torch.arange(size) for size in mask.shape), indexing="ij")
    assert torch.equal(block_mask.mask_mod(sample, torch.tensor(0), row, key), mask)


def _with_counted_compilations(body, *arguments):
    """Run ``body`` with attend compiled without Triton or a C++ compiler; (its result, how often torch.compile began anew).

    In a forked child: after dynamo, the next backward pass starts a thread for each of eight devices, and then no test may fork.
    """
    (result,) = run_distributed(_counted, 1, body, *arguments, process_group=False)
    return result


def _counted(_rank, _size, body, *arguments):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=counter)
    flex.compiled_flex_attention = lambda: compiled
    return body(*arguments), counter.frame_count


def _errors(groups):
    """By kind: (relative error of the output, whether rows that see nothing are zero)."""
    errors = {}
    for kind in INTERVAL_KINDS:
        case = AttentionCase(VARIANTS[kind][0], "fp32", 4, groups, 16)
        visibility = long_pack(300, kind)
        query, key, value = (tensor.detach() for tensor in inputs_of(visibility, case, torch.float32))
        backend = FlexBackend(case)
        output = backend.attend(query, key, value, backend.prepare(visibility), 0.3)
        mask = visibility.dense()
        expected = attend_reference(query, key, value, mask, 0.3)
        blind_are_zero = bool((output.transpose(1, 2)[~mask.any(-1)] == 0).all())
        errors[kind] = (float((output - expected).norm() / expected.norm()), blind_are_zero)
    return errors


@pytest.mark.parametrize("groups", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_outputs(groups):
    errors, _ = _with_counted_compilations(_errors, groups)
    assert set(errors) == set(INTERVAL_KINDS)
    for kind, (error, blind_are_zero) in errors.items():
        assert error <= 1e-6, kind
        assert blind_are_zero, kind


def _many_packings():
    case = AttentionCase("blocks", "fp32", 2, 2, 16)
    backend = FlexBackend(case)
    for seed in range(4):
        for block_size in (4, 32):
            visibility = long_pack(256, "blocks", seed=seed, block_size=block_size, padding=40 * (seed % 2))
            query, key, value = (tensor.detach() for tensor in inputs_of(visibility, case, torch.float32))
            backend.attend(query, key, value, backend.prepare(visibility))


def test_one_compilation_serves_all_packings():
    assert _with_counted_compilations(_many_packings) == (None, 1)


def _error_with_gradients():
    visibility = long_pack(256, "documents")
    case = AttentionCase("documents", "fp32", 2, 2, 16)
    backend = FlexBackend(case)
    with pytest.raises(Exception, match=r"backward on CPU|Observed exception") as raised:
        backend.attend(*inputs_of(visibility, case, torch.float32), backend.prepare(visibility))
    return str(raised.value)


def test_no_gradients_on_the_cpu():
    """Why it does not serve there. The day this fails, it can."""
    assert _with_counted_compilations(_error_with_gradients)[0]

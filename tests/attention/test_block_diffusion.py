"""The two-stream mask: published fingerprints, the definition on random packs, and what must not be seen."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.test_visibility import packs
from tests.slow import examples
from w1train.attention.visibility import block_diffusion_visibility

# (number of ones, first 16 hex digits of sha256 over the row-major uint8 mask), layout [x_t | x_0].
GOLDEN = {
    (4, 1): (20, "4a0932fc28862899"),
    (4, 2): (24, "082bd2e74d5e7702"),
    (16, 4): (320, "1ac2b52260735a5c"),
    (128, 32): (20480, "44dc585a3d84c91c"),
    (128, 128): (32768, "3aa4a3a136e62865"),
}
GOLDEN_TOKEN_CAUSAL = {
    (4, 2): (22, "efe29419a3a0748e"),
    (16, 4): (296, "68902680f6bcad13"),
    (128, 32): (18496, "498987a3b476755e"),
}
GOLDEN_CAUSAL = {
    (4, 2): (20, "65f2bfb12dd7cbab"),
    (16, 4): (272, "63515fd83ea2ee0e"),
    (128, 32): (16512, "0546e24c3cc6761e"),
}
VARIANTS = {"bidirectional-block": (), "bidirectional-token": ("token_causal",), "causal-token": ("token_causal", "causal")}
ALL_GOLDEN = [
    (shape, variant, expected)
    for variant, golden in zip(VARIANTS, (GOLDEN, GOLDEN_TOKEN_CAUSAL, GOLDEN_CAUSAL), strict=True)
    for shape, expected in golden.items()
]
GOLDEN_PACKS = {
    ((8, 4), 4, "document"): (128, "e423f8f0c1c76824"),
    ((8, 4), 4, "sample"): (128, "e423f8f0c1c76824"),
    ((6, 6), 4, "sample"): (112, "31b67223ad41a1ea"),
    ((6, 6), 4, "document"): (112, "8b3e252a5c811e9d"),
}


def _fingerprint(visibility):
    mask = visibility.dense()[0].to(torch.uint8).numpy()
    return int(mask.sum()), hashlib.sha256(mask.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("shape", "variant", "expected"), ALL_GOLDEN, ids=str)
def test_golden_single_document(shape, variant, expected):
    length, block_size = shape
    documents = torch.zeros((1, length), dtype=torch.int32)
    for block_index in ("document", "sample"):
        assert _fingerprint(block_diffusion_visibility(documents, block_size, block_index, *VARIANTS[variant])) == expected


@pytest.mark.parametrize(("pack", "expected"), GOLDEN_PACKS.items(), ids=str)
def test_golden_packs(pack, expected):
    lengths, block_size, block_index = pack
    documents = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))[None]
    assert _fingerprint(block_diffusion_visibility(documents, block_size, block_index)) == expected


@settings(max_examples=examples(1000))
@given(packs(), st.integers(1, 45), st.sampled_from(["document", "sample"]), st.sampled_from(sorted(VARIANTS)))
def test_is_the_definition(documents, block_size, block_index, variant):
    visibility = block_diffusion_visibility(documents, block_size, block_index, *VARIANTS[variant])
    mask = visibility.dense()
    length = documents.shape[1]
    position = torch.arange(length)
    for row, ids in enumerate(documents.tolist()):
        first = {document: ids.index(document) for document in set(ids)}
        origin = torch.tensor([first[document] if block_index == "document" else 0 for document in ids])
        block = torch.div(position - origin, block_size, rounding_mode="floor")
        same = (documents[row][:, None] == documents[row][None, :]) & (documents[row] >= 0)[:, None]
        own, before = block[:, None] == block[None, :], block[:, None] > block[None, :]
        causal = position[:, None] >= position[None, :]
        expected = torch.zeros((2 * length, 2 * length), dtype=torch.bool)
        expected[:length, :length] = same & own & (causal if variant.startswith("causal") else True)
        expected[:length, length:] = same & before
        expected[length:, length:] = same & (causal if variant.endswith("token") else own | before)
        assert torch.equal(mask[row], expected)
    assert int(visibility.num_visible_pairs()) == int(mask.sum())
    assert (visibility.endpoints.diff(dim=0) >= 0).all()
    assert len(visibility.endpoints) == 5, "three intervals a row at most"

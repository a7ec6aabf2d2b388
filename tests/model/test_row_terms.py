"""What is asked of rows of logits, against its definition in float64: values, gradients, chunks, split vocabularies, memory."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed
from tests.kernels import oracle, row_terms
from w1train.model.chunked_head import Head, linear_row_terms
from w1train.model.row_terms import CrossEntropy, Entropy, LogProbabilities, Vocabulary, value_of
from w1train.model.row_terms.row_term import WHOLE_VOCABULARY, statistics_of

NUM_ROWS, VOCABULARY, SIZE = 9, 52, 12
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("excluded", [None, 14])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 100])
@pytest.mark.parametrize("name", row_terms.TERMS)
def test_each_term_is_its_definition(name, chunk_size, excluded, dtype):
    # Scores are exponentials of rounded logits, and no softmax divides them by a sum with the same error.
    tolerance = TOLERANCE[dtype] * (2 if name == "score entropy" else 1)
    oracle.check_term(name, NUM_ROWS, VOCABULARY, chunk_size, excluded, dtype, "torch", tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", row_terms.TERMS)
def test_each_term_of_whole_rows_is_its_definition(name, dtype):
    """The term has the precision of the logits, also where the logits are large (but not where their exponentials are the value)."""
    logits = (3 if name == "score entropy" else 100) * torch.randn(
        (NUM_ROWS, VOCABULARY), generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    logits = logits.index_fill(1, torch.tensor([14]), float("-inf")).to(dtype)
    term, before = row_terms.make_term(name, NUM_ROWS, VOCABULARY, 14), logits.clone()
    found = value_of(term, logits)
    assert found.dtype == dtype
    assert torch.equal(logits, before)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-14 if name in row_terms.OF_SOFTMAX else 1e-10}[dtype]
    torch.testing.assert_close(found.double(), row_terms.dense_term(term, logits.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("excluded", [None, 14])
@pytest.mark.parametrize("name", row_terms.TERMS)
def test_each_gradient_is_that_of_its_definition_in_float64(name, excluded):
    logits = 3 * torch.randn((NUM_ROWS, VOCABULARY), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    if excluded is not None:
        logits = logits.index_fill(1, torch.tensor([excluded]), float("-inf"))
    term = row_terms.make_term(name, NUM_ROWS, VOCABULARY, excluded)
    (upstream,) = row_terms.upstream_of([name], NUM_ROWS, torch.Generator().manual_seed(5))
    wide = logits.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(row_terms.dense_term(term, wide), wide, upstream)
    found, statistics = statistics_of(term, logits.clone())
    term.write_gradient(found, slice(None), statistics, upstream, WHOLE_VOCABULARY)
    torch.testing.assert_close(found, wanted.nan_to_num(0.0), rtol=1e-10, atol=1e-10)


def _terms(names, excluded):
    return [row_terms.make_term(name, NUM_ROWS, VOCABULARY, excluded) for name in names]


def _random_case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = ((NUM_ROWS, SIZE), (VOCABULARY, SIZE))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [value.to(dtype) for value in (*values, *row_terms.upstream_of(row_terms.TERMS, NUM_ROWS, generator))]


def _on_rank(rank, size, chunk_size, excluded, sum_row_gradients):
    """All terms in one pass over a vocabulary that the ranks share: values, the rows' gradient, and this rank's of the weight."""
    rows, weight, *upstream = _random_case()
    part = VOCABULARY // size
    rows.requires_grad_()
    own = weight[rank * part : (rank + 1) * part].clone().requires_grad_()
    vocabulary = Vocabulary(dist.group.WORLD if size > 1 else None, rank * part, excluded)
    terms = _terms(row_terms.TERMS, excluded)
    with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        values = linear_row_terms(rows, own, terms, Head(vocabulary, chunk_size, sum_row_gradients))
        torch.autograd.backward(values, upstream)
    num_messages = 3 * math.ceil(NUM_ROWS / chunk_size) + sum_row_gradients
    assert all_reduce.call_count == (num_messages if size > 1 else 0), "three for each chunk, and the rows' gradients once"
    return [value.detach() for value in values], rows.grad, own.grad, _table_of(terms).grad


def _table_of(terms):
    (table,) = [parameter for term in terms for parameter in term.parameters]
    return table


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_all_terms_in_one_pass_over_a_split_vocabulary(num_ranks):
    """Chunks that divide the rows and that do not; the excluded token is on one rank; row gradients summed or left as partial sums."""
    rows, weight, *upstream = (value.double() for value in _random_case())
    for chunk_size, excluded, sum_row_gradients in ((3, 14, True), (4, None, False), (100, 51, True)):
        rows, weight = rows.detach().requires_grad_(), weight.detach().requires_grad_()
        terms = _terms(row_terms.TERMS, excluded)
        wanted = [row_terms.dense_term(term, oracle.dense_logits(rows, weight, excluded)) for term in terms]
        torch.autograd.backward(wanted, upstream)
        outcomes = run_distributed(_on_rank, num_ranks, chunk_size, excluded, sum_row_gradients)
        for values, *_ in outcomes:
            assert all(torch.equal(value, first) for value, first in zip(values, outcomes[0][0], strict=True)), "no two ranks differ"
            for value, expected in zip(values, wanted, strict=True):
                torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        _assert_close_by_norm(torch.cat([outcome[2] for outcome in outcomes]), weight.grad)
        _assert_close_by_norm(sum(outcome[3] for outcome in outcomes), _table_of(terms).grad)
        found = [outcome[1] for outcome in outcomes]
        for row_gradient in found if sum_row_gradients else [sum(found)]:
            _assert_close_by_norm(row_gradient, rows.grad)


def _assert_close_by_norm(found, wanted):
    assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()


def _gradients(terms, upstream, dtype=torch.float32):
    rows, weight, *_ = _random_case(dtype)
    values = linear_row_terms(rows.requires_grad_(), weight.requires_grad_(), terms, oracle.one_rank(4, 14))
    return [value.detach() for value in values], torch.autograd.grad(
        [values[place] for place in upstream], [rows, weight], list(upstream.values())
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_term_that_is_only_logged_changes_no_bit_of_the_others(dtype, monkeypatch):
    """Nor does it cost a gradient."""
    monkeypatch.setattr(Entropy, "write_gradient", lambda *_: pytest.fail("nobody asked for it"))
    cross_entropy, log_probabilities, entropy = _terms(row_terms.OF_SOFTMAX, 14)
    upstream = torch.randn(NUM_ROWS)
    (alone,), gradients = _gradients([cross_entropy], {0: upstream}, dtype)
    (_, beside, _), also = _gradients([entropy, cross_entropy, log_probabilities], {1: upstream}, dtype)
    assert torch.equal(alone, beside)
    assert all(torch.equal(one, other) for one, other in zip(gradients, also, strict=True))


def test_gradients_of_several_terms_are_added_up_in_fp32():
    """In bf16 the gradients of -log p and log p, 256 and -255 times, would leave the rounding of both."""
    cross_entropy, entropy = CrossEntropy(torch.arange(NUM_ROWS)), Entropy()
    times = torch.full((NUM_ROWS,), 256.0)
    _, many = _gradients(
        [cross_entropy, LogProbabilities(torch.arange(NUM_ROWS)[:, None])], {0: times, 1: times[:, None] - 1}, torch.bfloat16
    )
    _, once = _gradients([cross_entropy, entropy], {0: times / 256}, torch.bfloat16)
    for one, other in zip(many, once, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_values_of_extreme_logits():
    """A softmax that is one token has no entropy, logits of 10^4 overflow nothing, and the excluded token has no probability."""
    weight = torch.tensor([[1e4], [0.0], [-1e4], [1.0]])
    terms = [CrossEntropy(torch.tensor([1, 2])), LogProbabilities(torch.tensor([[0, 3], [1, 3]])), Entropy()]
    rows = torch.tensor([[1.0], [0.0]], requires_grad=True)
    of_target, of_ids, entropy = linear_row_terms(rows, weight, terms, oracle.one_rank(2, 3))
    assert of_target.tolist() == pytest.approx([1e4, torch.tensor(3.0).log().item()])
    assert of_ids[:, 0].tolist() == pytest.approx([0.0, -torch.tensor(3.0).log().item()])
    assert of_ids[:, 1].tolist() == [float("-inf")] * 2
    assert entropy.tolist() == pytest.approx([0.0, torch.tensor(3.0).log().item()])
    entropy.sum().backward()
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("name", row_terms.TERMS)
def test_terms_of_nothing(name):
    """A micro-batch in which no token is masked."""
    weight, rows = torch.randn((5, 4), requires_grad=True), torch.zeros((0, 4), requires_grad=True)
    (found,) = linear_row_terms(rows, weight, [row_terms.make_term(name, 0, 5, None)], oracle.one_rank(4))
    found.sum().backward()
    assert len(found) == 0
    assert weight.grad.count_nonzero() == 0


def test_gradient_goes_into_the_fp32_buffer():
    """On top of what is there, chunk by chunk, without a rounding to bf16; autograd gets zeros to add to a tied embedding's gradient."""
    rows = torch.randn((40, 12), dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn((50, 12), dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50, (40,))
    weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = torch.ones((50, 12)), False, True
    linear_row_terms(rows, weight, [CrossEntropy(targets)], oracle.one_rank(8))[0].sum().backward()
    wide = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(rows.detach().double() @ wide.t(), targets, reduction="sum").backward()
    error = (weight.main_grad - 1 - wide.grad).norm() / wide.grad.norm()
    assert error < 1e-2
    assert weight.grad_added_to_main_grad
    assert weight.grad.count_nonzero() == 0


def _largest_tensor(function):
    """Bytes of the largest tensor that any operation inside makes."""
    sizes = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            output = operation(*args, **(kwargs or {}))
            sizes.extend(value.untyped_storage().nbytes() for value in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(value))
            return output

    with Watch():
        function()
    return max(sizes)


def _saved_bytes(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function()
    return sum(tensor.nbytes for tensor in saved)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_never_holds_all_logits(dtype):
    """In both directions the largest tensor has a chunk's logits (fp32 in the twin). In between a few numbers of each row are kept: two of
    each softmax (two terms have their own), one for each token that is read, and the sums."""
    num_rows, vocabulary, size, chunk_size = 256, 512, 8, 32
    rows = torch.randn((num_rows, size), dtype=dtype, requires_grad=True)
    weight = torch.randn((vocabulary, size), dtype=dtype, requires_grad=True)
    terms = [row_terms.make_term(name, num_rows, vocabulary, None) for name in row_terms.TERMS]

    def run(chunk_size, terms):
        return lambda: sum(value.sum() for value in linear_row_terms(rows, weight, terms, oracle.one_rank(chunk_size))).backward()

    assert _largest_tensor(run(num_rows, terms)) == num_rows * vocabulary * 4
    assert _largest_tensor(run(chunk_size, terms)) == chunk_size * vocabulary * 4
    # The autograd of a chunk's rates keeps their t.
    terms = [term for term in terms if not term.parameters]
    num_kept = 2 * 3 + sum(term.num_sums + (0 if term.chosen_ids is None else len(term.chosen_ids)) for term in terms)
    assert _saved_bytes(run(chunk_size, terms)) == rows.nbytes + weight.nbytes + num_kept * num_rows * 4

"""Samples of one document each, and what follows the end of a document, against the documents they are made of."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from tests.data.test_may_be_noised import flagged_dataset
from tests.data.test_packing import epoch_samples, numbered_dataset, real
from tests.tiny import tiny_config
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.packed.packing import Fill
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing
from w1train.data.packed.separate import SeparateDataset
from w1train.data.writer import DatasetWriter
from w1train.training.dataset_kinds import check_whole_conversations
from w1train.training.training_data import ValidationSet, open_source

LENGTHS = [3, 8, 2, 5, 6, 2, 7, 4]
STARTS = np.cumsum([0, *LENGTHS])
LENGTH = 8
EOS = 99


def _ended(dataset, lengths, without=()):
    """The dataset with EOS at the end of each document but those of ``without``."""
    tokens = np.fromfile(f"{dataset.prefix}.bin", dtype=np.int32)
    ends = np.cumsum(lengths) - 1
    tokens[[end for number, end in enumerate(ends) if number not in without]] = EOS
    tokens.tofile(f"{dataset.prefix}.bin")
    return dataset


def _document(sample):
    """The number of the document that a sample of ``numbered_dataset`` holds."""
    return int(np.searchsorted(STARTS, sample["tokens"][0], side="right")) - 1


def _expected(document, filled_to, flags=None, ended=False):
    """Tokens, document_ids, positions and may_be_noised of a sample, token by token."""
    own, end = LENGTHS[document], max(LENGTHS[document], filled_to)
    rows = []
    for place in range(LENGTH):
        number, inside = int(STARTS[document]) + place, place < end
        token = number if place < own - ended else EOS if inside else 0
        may = (flags is None or flags[number]) if place < own else inside
        rows.append((token, 0 if inside else -1, place if inside else 0, may))
    return [list(column) for column in zip(*rows, strict=True)]


def _found(sample):
    return [sample[name].tolist() for name in ("tokens", "document_ids", "positions", "may_be_noised")]


@pytest.mark.parametrize("epoch", [0, 3])
def test_every_document_is_a_sample_once_an_epoch(tmp_path, epoch):
    samples = epoch_samples(SeparateDataset(numbered_dataset(tmp_path, LENGTHS), LENGTH, seed=5), epoch)
    order = [_document(sample) for sample in samples]
    assert sorted(order) == list(range(len(LENGTHS)))
    assert order != sorted(order)
    assert [_found(sample) for sample in samples] == [_expected(document, 0) for document in order]


def test_epochs_and_seeds_have_their_own_order(tmp_path):
    dataset = numbered_dataset(tmp_path, LENGTHS)
    orders = [[_document(s) for s in epoch_samples(SeparateDataset(dataset, LENGTH, seed), epoch)] for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_sides_of_a_pair_follow_each_other(tmp_path):
    source = SeparateDataset(numbered_dataset(tmp_path, LENGTHS), LENGTH, seed=5, pairs=True)
    for epoch in range(3):
        order = [_document(sample) for sample in epoch_samples(source, epoch)]
        assert [document + 1 for document in order[::2]] == order[1::2]
        assert sorted(order[::2]) == [0, 2, 4, 6]
    again = pickle.loads(pickle.dumps(source))
    assert [_document(again.sample(index)) for index in range(16, 24)] == order


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("kind", ["block", "batch", "sample"])
def test_fill_by_hand(tmp_path, kind, pairs):
    """Documents without EOS, or whose EOS may not be noised, get no fill."""
    flags = [token % 3 > 0 for token in range(int(STARTS[-1]))]
    dataset = _ended(flagged_dataset(tmp_path, LENGTHS, flags), LENGTHS, without={1, 3})
    size = {"block": 4, "batch": 3, "sample": LENGTH}[kind]
    source = SeparateDataset(dataset, LENGTH, seed=5, pairs=pairs, fill=Fill(kind, size, EOS))
    plain = [_document(source.sample(index)) for index in range(24)]
    for index, document in enumerate(plain):
        group = plain[index // 3 * 3 : index // 3 * 3 + 3]
        longest = max(LENGTHS[each] for each in (group if len(group) == 3 else plain))
        end = {"block": -(-LENGTHS[document] // 4) * 4, "batch": longest, "sample": LENGTH}[kind]
        last = int(STARTS[document + 1]) - 1
        ended = document not in (1, 3)
        assert _found(source.sample(index)) == _expected(document, end if flags[last] and ended else 0, flags, ended), (index, document)
    assert {bool(flags[int(STARTS[document + 1]) - 1]) for document in plain} == {True, False}


def test_fill_of_packed_documents(tmp_path):
    """Each document of a best-fit sample is filled to the next block; the rest of the sample stays padding. Parts of a document that is cut
    are filled at its end alone."""
    lengths = [3, 21, 2, 4, 6, 5]
    dataset = _ended(numbered_dataset(tmp_path, lengths), lengths)
    options = PackingOptions(sequence_length=16, align=4)
    ensure_packing(dataset, options)
    plain, filled = (epoch_samples(BestFitDataset(dataset, options, 5, fill=fill)) for fill in (None, Fill("block", 4, EOS)))
    num_filled = 0
    for before, after in zip(plain, filled, strict=True):
        for number in range(before["document_ids"].max() + 1):
            own, both = before["document_ids"] == number, after["document_ids"] == number
            first, end = np.flatnonzero(own)[[0, -1]] + [0, 1]
            block_end = -(-end // 4) * 4
            assert np.flatnonzero(both).tolist() == list(range(first, block_end))
            assert after["positions"][both].tolist() == list(range(block_end - first))
            assert after["tokens"][end:block_end].tolist() == [EOS] * (block_end - end)
            assert after["may_be_noised"][both].all()
            num_filled += block_end - end
        assert all(
            np.array_equal(a, b)
            for a, b in zip(
                real(before),
                [x[before["document_ids"] >= 0] for x in (after["tokens"], after["document_ids"], after["positions"])],
                strict=True,
            )
        )
    assert num_filled == sum(-length % 4 for length in lengths)


def test_bad_documents_are_refused(tmp_path):
    too_long = numbered_dataset(tmp_path / "a", [3, 9, 5, 10])
    with pytest.raises(
        DatasetError, match=r"2 documents of .* longer than data.sequence_length \(8\): document 1 has 9 tokens.*--max-length 8"
    ):
        SeparateDataset(too_long, LENGTH, seed=5)
    with pytest.raises(DatasetError, match=r"document 1 of .* has no tokens"):
        SeparateDataset(numbered_dataset(tmp_path / "b", [3, 0, 5]), LENGTH, seed=5)
    with pytest.raises(DatasetError, match="has 3 documents, and preferences need pairs"):
        SeparateDataset(numbered_dataset(tmp_path / "c", [3, 2, 5]), LENGTH, seed=5, pairs=True)
    config = tiny_config(data={"packing": "separate", "fill": "sample", "sequence_length": LENGTH})
    with pytest.raises(DatasetError, match=r"has no manifest, so data\.fill=sample is not possible"):
        open_source(numbered_dataset(tmp_path / "d", [3, 2]), config)


@pytest.fixture
def conversations(tokenizer, tmp_path):
    """Six documents of a prompt of two tokens and a reply."""
    with DatasetWriter(tmp_path / "talk", tokenizer, limits_noise=True) as writer:
        for number in range(6):
            ids = [20, 21, *range(30, 33 + number)]
            writer.add_document(ids, num_text_bytes=len(ids), may_be_noised=[False, False] + [True] * (len(ids) - 1))
        writer.finalize()
    return TokenDataset.open(tmp_path / "talk")


class _OneRank:
    data_parallel_rank, data_parallel_size, is_main, device = 0, 1, False, "cpu"


@pytest.mark.parametrize("packing", ["best_fit", "separate", "cut"])
def test_validation_scores_replies_after_their_prompts(conversations, tokenizer, packing):
    """Cut samples would lose prompts, so only plain text is cut."""
    config = tiny_config(data={"packing": packing, "sequence_length": 16, "align": 1 if packing == "cut" else 4})
    config.data.fill = "none" if packing == "cut" else "block"
    batches = list(ValidationSet(conversations.prefix, config, _OneRank(), tokenizer).batches())
    rows = list(itertools.chain.from_iterable(batch.tokens for batch in batches))
    if packing == "cut":
        assert len(rows) == 4
        return
    assert sum(int(batch.may_be_noised.sum()) for batch in batches) == sum(-(-(6 + number) // 4) * 4 - 2 for number in range(6))
    for batch in batches:
        for tokens, documents, may in zip(batch.tokens, batch.document_ids, batch.may_be_noised, strict=True):
            assert tokens[:2].tolist() == [20, 21]
            assert documents.max() == 0
            assert not may[:2].any()
            assert tokens[documents == 0][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("packing", "words"), [("cut", "would cut them"), ("best_fit", "3 documents of .* longer"), ("separate", "3 documents of")]
)
def test_no_conversation_is_cut_by_a_run(tokenizer, tmp_path, packing, words):
    with DatasetWriter(tmp_path / "talk", tokenizer, limits_noise=True) as writer:
        for number in range(6):
            ids = [20, 21, *range(30, 33 + number)]
            writer.add_document(ids, num_text_bytes=len(ids), may_be_noised=[False, False] + [True] * (len(ids) - 1))
        writer.finalize()
    dataset = TokenDataset.open(tmp_path / "talk")
    config = tiny_config(data={"packing": packing, "sequence_length": LENGTH})
    check_whole_conversations(config, dataset)
    dataset.manifest = dataclasses.replace(dataset.manifest, conversations={"kind": "conversations"})
    with pytest.raises(DatasetError, match=words):
        open_source(dataset, config)

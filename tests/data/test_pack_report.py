"""What the report of packing counts, against documents laid out one token at a time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_tools.pack_report import report_best_fit, report_cut

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 25))
def test_cut_is_what_laying_out_the_tokens_gives(lengths, sequence_length):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    samples = [documents[start : start + sequence_length] for start in range(0, len(documents), sequence_length)]
    in_samples = [sum(document in sample for sample in samples) for document in range(len(lengths))]
    report = report_cut(np.array(lengths), sequence_length)
    assert report.num_samples == len(samples)
    assert report.waste == 1 - len(documents) / (len(samples) * sequence_length)
    assert report.num_cut == sum(count > 1 and length <= sequence_length for count, length in zip(in_samples, lengths, strict=True))
    assert report.num_long == sum(length > sequence_length for length in lengths)
    per_sample = [len(set(sample)) for sample in samples]
    assert (report.mean_documents, report.max_documents) == (np.mean(per_sample), max(per_sample))


@given(LENGTHS, st.integers(1, 25))
def test_best_fit_cuts_long_documents_alone(lengths, sequence_length):
    report = report_best_fit(np.array(lengths), sequence_length)
    num_pieces = sum(-(-length // sequence_length) for length in lengths)
    assert report.num_cut == 0
    assert np.isclose(report.num_samples * report.mean_documents, num_pieces)
    assert np.isclose(report.num_samples * sequence_length * (1 - report.waste), sum(lengths))
    assert -(-sum(lengths) // sequence_length) <= report.num_samples <= num_pieces

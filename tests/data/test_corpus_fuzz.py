"""Every document of random corpora is counted: as read, as skipped for its reason, or as an error."""

from __future__ import annotations

import pytest

from tests.data import corpus_fuzz

pytest.importorskip("pyarrow")


@pytest.mark.parametrize("seeds", [range(30), pytest.param(range(30, 1000), marks=pytest.mark.slow)], ids=["some", "many"])
def test_every_document_is_counted(seeds):
    tokenizer = corpus_fuzz.small_tokenizer()
    with corpus_fuzz.no_disk():
        for seed in seeds:
            corpus_fuzz.check(seed, tokenizer)

"""The counts of token ids that masks by information need."""

import numpy as np

from data_tools import count_tokens


def test_the_counts_are_those_of_all_datasets(tmp_path, tokenizer, make_dataset, caplog):
    documents = [[3, 3, 70], [5], [70, 70, 70, 70]]
    for name, part in (("one", documents[:2]), ("two", documents[2:])):
        make_dataset(tmp_path / name, part)
    output, prefixes = tmp_path / "counts.npy", [str(tmp_path / name) for name in ("one", "two")]
    words = [*prefixes, "--vocab-size", "300", "--output", str(output)]
    assert count_tokens.main(words) == 0
    counts = np.load(output)
    assert counts.shape == (300,)
    assert {int(token): int(counts[token]) for token in counts.nonzero()[0]} == {3: 2, 5: 1, 70: 5, tokenizer.eos_token_id: 3}
    assert count_tokens.main(words) == 1, "a file that exists is kept"
    assert "--overwrite" in caplog.text
    assert count_tokens.main([*words, "--overwrite"]) == 0
    assert count_tokens.main([prefixes[0], "--vocab-size", "50", "--output", str(tmp_path / "few.npy")]) == 1
    assert not (tmp_path / "few.npy").exists(), "an id is outside"

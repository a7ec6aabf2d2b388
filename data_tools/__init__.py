"""From text to datasets: train a tokenizer, tokenize a corpus."""

"""The commands that make datasets of text: they train a tokenizer, tokenize a corpus and inspect datasets."""

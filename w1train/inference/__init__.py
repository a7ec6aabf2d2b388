"""A trained model as a function of tokens."""

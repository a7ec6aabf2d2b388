"""The training loop and what is written while it runs."""

"""Conversion of weights: Hugging Face checkpoints to models of w1train, and back."""

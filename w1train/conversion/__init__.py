"""Weights from and to other formats: Hugging Face checkpoints in, Hugging Face models out."""

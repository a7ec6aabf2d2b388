"""Sampling of text from a trained model by iterative denoising, with plain tensors and without process groups."""

"""Sampling: text from a trained model by iterative denoising; plain tensors, no process groups."""

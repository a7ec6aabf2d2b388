"""Noise: timesteps, noise processes and corrupted batches, as plain tensors without process groups."""

"""Evaluation of a trained model: validation of checkpoints, and likelihoods of given texts."""

"""Objectives, which say what is trained: terms of the loss, weights and normalisers, and the sums that are logged."""

"""Checks of a machine for w1train.doctor: what works on it, and how fast."""

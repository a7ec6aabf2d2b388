"""Checkpoints: planned, written, hashed, committed, verified, recovered, kept, averaged."""

"""Tests: fast, on CPU, from the repository root (`make test`); those that need a GPU are marked so (`make test-gpu`)."""

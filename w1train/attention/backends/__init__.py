"""Kernels that compute attention, with one interface, and the choice between them."""

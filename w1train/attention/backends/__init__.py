"""The kernels that compute attention, behind one interface, and the choice between them."""

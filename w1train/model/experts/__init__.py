"""The mixture of experts: router, experts, and the layer that sends tokens to them."""

"""The diffusion process: timesteps, corruption and losses; plain tensors, no process groups."""

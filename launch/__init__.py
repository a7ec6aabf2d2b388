"""Scripts that set up the environment and start runs."""

"""Programs and scripts that set up the environment and start runs."""

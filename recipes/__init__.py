"""Packaged recipes: Hydra groups of plain YAML, and ``recipe/`` = complete runs. They only select and override."""

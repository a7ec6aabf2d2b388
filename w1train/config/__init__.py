"""Configuration: the dataclass tree, recipe composition and validation."""

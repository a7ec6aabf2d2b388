"""Files that are copied into an exported model. They need torch and transformers, and import nothing from w1train."""

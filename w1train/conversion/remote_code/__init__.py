"""Files that an exported model carries with it. They need torch and transformers, nothing of w1train."""

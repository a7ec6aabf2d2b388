"""What is trained and what is logged of it."""

"""Conversations as documents: records become messages, and messages become tokens of which the replies alone may be noised."""

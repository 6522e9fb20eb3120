"""Rows of tokens on their way to other ranks' experts and back: exchanges, and what they travel through."""

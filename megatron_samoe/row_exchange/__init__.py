"""Exchanges that send rows of tokens to other ranks' experts and back, and their transports."""

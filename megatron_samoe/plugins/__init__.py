"""Layers that share experts, in programs of others."""

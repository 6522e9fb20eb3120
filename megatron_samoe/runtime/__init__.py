"""The start of every program that runs a model: joining ranks, and loading a model."""

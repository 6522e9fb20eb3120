"""Other models from a trained one: layers that share, that take one bank, fewer of them, or a dense model with experts."""

"""The memory, FLOPs and time of a model in a layout, read from its modules without running them."""

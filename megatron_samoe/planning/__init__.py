"""What a model needs and costs in a layout, read from its modules without running them."""

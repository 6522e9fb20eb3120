"""What makes pictures and computed tables of the docs."""

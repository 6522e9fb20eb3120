"""What checks the figures of docs/results against the stored runs, and these against their registration."""

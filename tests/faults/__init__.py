"""Faults planted in the package, to see whether the tests find them: the list that was drawn, and its runner."""

"""Programs as files, and what works only in a checkout: benchmarks, and the check of docs/results."""

"""Programs as files, and what works only in a checkout: benchmarks."""

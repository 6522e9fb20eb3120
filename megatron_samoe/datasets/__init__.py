"""From a corpus to training samples: indexed datasets, tokenizers, sample order, loading.

Import the modules directly. Nothing is re-exported here, so that the preprocessing tools, which need no
torch, start without the seconds that importing it takes.
"""

"""Zero-shot tasks: data files, prompts, scores, metrics, and how sure one can be of them."""

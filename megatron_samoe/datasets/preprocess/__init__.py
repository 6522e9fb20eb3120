"""From a corpus to an indexed dataset.

A corpus is cut into numbered chunks (inputs.py), workers turn chunks into ids (encode.py) and write them to their
offsets in the output themselves (writer.py); the coordinator (run.py) only hands out offsets, in the order of the
chunks, and keeps the journal that makes a run resumable. Nothing here needs torch.
"""

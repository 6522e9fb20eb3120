"""Hugging Face checkpoints: export to a class of transformers that computes the same function, and import.

parts       one tensor of theirs as a part of one of ours, for both directions
families    for each class: when it fits, its config.json, its tensors; and the way back
safetensors_io, source, export     files, read and written tensor by tensor
remote_code                        our own class, copied next to the weights where no stock class fits
"""

"""GGUF, the file of llama.cpp: folded models of architectures that it has.

architectures   which of them computes a native model, its metadata and the names of its tensors
tokenizer       the vocabulary, where llama.cpp knows how to cut a text
export          plan and file, tensor by tensor
"""

"""Layers that share experts, in other programs: trained in Megatron-Core, served by vLLM."""

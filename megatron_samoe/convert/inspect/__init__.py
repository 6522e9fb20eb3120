"""Descriptions of a model of any family (`megatron-samoe inspect`)."""

"""What a model of any family is, described (`megatron-samoe inspect`)."""

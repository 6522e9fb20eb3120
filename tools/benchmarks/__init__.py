"""Speed and memory against limits, plain torch and other programs, measured in one run: `megatron-samoe benchmark`."""

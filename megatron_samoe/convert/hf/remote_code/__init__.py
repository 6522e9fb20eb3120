"""Our model as one self-contained class of transformers.

The files are copied next to exported weights, where transformers loads them with trust_remote_code=True, without
megatron_samoe. Here only the plug-in for vLLM imports them.
"""

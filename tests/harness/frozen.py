"""Loaded last by the fork server: what a run would do each time anew, and its children's garbage collections pass over what
was loaded before, and copy none of it.

The compiled extension takes a third of a second; what tyro loads for a first command line, a twentieth of one.
"""

import gc

import torch.utils.serialization.config  # noqa: F401

import megatron_samoe.dist_checkpointing.file_storage  # noqa: F401
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.ops import extension

extension.available()
parse_pretrain_args(["--mock-data"])
gc.collect()
gc.freeze()

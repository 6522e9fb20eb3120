"""Loaded last by the fork server: what a run would do each time anew, and its children's garbage collections pass over what
was loaded before, and copy none of it.

The compiled extension takes a third of a second; what tyro loads for a first command line, a twentieth of one; the spread of
experts' first weights, which is estimated from a sample, as long for each kind of router.
"""

import gc

import torch.utils.serialization.config  # noqa: F401

import megatron_samoe.dist_checkpointing.file_storage  # noqa: F401
from megatron_samoe.config.cli import parse_pretrain_args
from megatron_samoe.config.sharing_map import ways
from megatron_samoe.models.blueprint import expert_shape
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.ops import extension
from tests.harness.layout_training import MODELS, options_in

extension.available()
parse_pretrain_args(["--mock-data", "--save", "x"])  # of an option that may be None tyro asks typeguard
for options in MODELS.values():
    config = options_in("one process", options)
    for layer in all_layers(config):
        if layer.num_experts:
            expert_shape(config, layer)
ways.cache_clear()  # a test may install a package that adds one
gc.collect()
gc.freeze()

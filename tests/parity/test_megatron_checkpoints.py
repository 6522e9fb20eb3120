"""Per-rank files in megatron-core's own GPTModel: every rank's loads strictly, and logits are ours.

megatron-core's modules of the `local` kind can be built and run on a CPU once the few calls that ask for a CUDA device
are answered; ranks of a layout are played one after another in a process group that does not communicate.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_samoe.config.cli import from_mapping
from megatron_samoe.convert.megatron import MegatronReader
from megatron_samoe.convert.megatron.arguments import UNSUPPORTED, from_arguments, to_arguments
from megatron_samoe.convert.megatron.rank_files import FILE_NAME
from megatron_samoe.convert.megatron.stored import canonical
from megatron_samoe.errors import CheckpointError
from tests.harness.megatron_files import write_rank_files
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, global_batch, tiny_config
from tests.unit.convert.memory_source import MemorySource, logits, new_source, router_gradients

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state as mpu
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig


#: What is known of the options of megatron-core's configuration.
OPTIONS = yaml.safe_load(Path(__file__).with_name("megatron_options.yaml").read_text())
TABLE = table(__file__)
OTHERWISE, TOGETHER, ARGUMENTS = OPTIONS["otherwise"], OPTIONS["together"], OPTIONS["arguments"]
INHERITED = {f.name for f in dataclasses.fields(ModelParallelConfig)}
FIELDS = [f for f in dataclasses.fields(TransformerConfig) if f.name not in INHERITED]


@pytest.fixture(autouse=True)
def cpu_in_place_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: types.SimpleNamespace())
    monkeypatch.setattr(megatron_random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)


@contextlib.contextmanager
def megatron_rank(args: argparse.Namespace, rank: int) -> Iterator[None]:
    """Sets Megatron's global parallel state as it is on a rank."""
    tp, pp, ep = (getattr(args, f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline", "expert"))
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * pp * ep)
    sizes = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": args.expert_tensor_parallel_size}
    mpu.initialize_model_parallel(tp, pp, **sizes, create_gloo_process_groups=False)
    try:
        yield
    finally:
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def spec_of(config: TransformerConfig) -> Any:
    """Returns Megatron's specification of its own layers of the local kind."""
    if config.num_moe_experts is None:
        return get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)


def megatron_model(args: argparse.Namespace, spec: Callable[[TransformerConfig], Any] = spec_of) -> GPTModel:
    """Builds this rank's part of the model from the arguments of a checkpoint, which have fields' names, as Megatron-LM does."""
    names = {f.name: ARGUMENTS.get(f.name, f.name) for f in dataclasses.fields(TransformerConfig)}
    given = {field: getattr(args, name) for field, name in names.items() if hasattr(args, name)}
    gelu = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    given["activation_func"] = torch.nn.functional.silu if args.swiglu else gelu
    given["num_query_groups"] = args.num_query_groups if args.group_query_attention else None
    config = TransformerConfig(**given | OPTIONS["on a CPU"], pipeline_dtype=torch.float32)
    return GPTModel(
        config,
        spec(config),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        parallel_output=True,
    )


def causal_mask(length: int) -> Tensor:
    """Returns True where Megatron's attention may not look."""
    return torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)


def export(source: MemorySource, root: Path, *sizes: int) -> Path:
    return write_rank_files(source, root, *sizes, fused=False, iteration=1)


@pytest.mark.parametrize(("layout", "options"), TABLE["models"])
@torch.no_grad()
def test_megatron_computes_our_logits(layout: str, options: dict, tmp_path: Path) -> None:
    config = tiny_config(layout, **options)
    source = new_source(config)
    content = torch.load(export(source, tmp_path) / "mp_rank_00" / FILE_NAME, weights_only=False)
    tokens = global_batch(config, 0)["tokens"]
    with megatron_rank(content["args"], 0):
        model = megatron_model(content["args"])
        model.load_state_dict(content["model"], strict=True)
        model.eval()
        theirs = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), causal_mask(tokens.shape[1]))
    torch.testing.assert_close(theirs[..., :VOCAB_SIZE].flatten(0, 1), logits(source), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sequences", "options"), TABLE["routers"])
def test_megatron_trains_routers_as_we_do(sequences: int, options: dict, tmp_path: Path) -> None:
    """Balance and z-loss of the arguments, as Megatron computes them: in a model of ours and in one that is read."""
    source = new_source(tiny_config("moe", style="llama", moe_router_topk=2, **options))
    content = torch.load(export(source, tmp_path) / "mp_rank_00" / FILE_NAME, weights_only=False)
    batch = global_batch(from_mapping(source.config, "test"), 0, sequences)
    tokens = batch["tokens"]
    with megatron_rank(content["args"], 0):
        model = megatron_model(content["args"])
        model.load_state_dict(content["model"], strict=True)
        length = tokens.shape[1]
        logits_BSV = model(tokens, torch.arange(length).expand_as(tokens), causal_mask(length))[..., :VOCAB_SIZE]
        torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), batch["labels"].flatten()).backward()
    theirs = [p.grad for name, p in model.named_parameters() if name.endswith("router.weight")]
    for ours in (source, MegatronReader(tmp_path)):
        torch.testing.assert_close(router_gradients(ours, batch), theirs, rtol=1e-3, atol=1e-5)


def test_names_of_transformer_engine_are_megatrons_own_translation() -> None:
    for alone, fused in get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map.items():
        assert canonical(f"decoder.layers.0.{fused}weight") == f"decoder.layers.0.{alone}weight"


def test_every_option_of_megatron_core_is_read_refused_or_without_effect() -> None:
    """A new option of Megatron must be put into one of the three before a model that uses it can be imported wrongly."""
    known = {*OTHERWISE, *OPTIONS["read"], *UNSUPPORTED}
    names = [f.name for f in FIELDS if f.name not in known and ARGUMENTS.get(f.name) not in known]
    without_effect = re.compile("|".join(OPTIONS["without_effect"]))
    assert len(FIELDS) > 150 and not [name for name in names if not without_effect.search(name)]


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_changes_megatrons_results_changes_the_model_or_is_refused(name: str) -> None:
    config = tiny_config("moe", style="llama", moe_router_topk=2, moe_router_load_balancing_type="aux_loss")
    plain = vars(to_arguments(config, VOCAB_SIZE, 104))
    together = {ARGUMENTS.get(n, n): v for n, v in TOGETHER.get(name, {}).items()}
    changed = {ARGUMENTS.get(name, name): OTHERWISE[name]}
    before = from_arguments(argparse.Namespace(**plain | together), "a file")
    try:
        after = from_arguments(argparse.Namespace(**plain | together | changed), "a file")
    except CheckpointError as error:
        assert f"cannot compute: {next(iter(changed))} is " in str(error)
    else:
        assert after != before

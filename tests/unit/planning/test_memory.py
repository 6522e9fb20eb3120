"""Bytes per rank against models built for every rank of a world, and activations against what autograd keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_samoe.config import PretrainConfig
from megatron_samoe.distributed.grad_buffer import GradBuffers
from megatron_samoe.models.layer_layout import all_layers
from megatron_samoe.models.rank_model import RankModel, build_model, compute_dtype
from megatron_samoe.optimizer.mixed_precision import MixedPrecisionOptimizer
from megatron_samoe.parallel_state import ParallelState, RankGrid, single_process_state
from megatron_samoe.pipeline_parallel.schedule_plan import make_plan, max_in_flight
from megatron_samoe.planning.activation_memory import activation_bytes, passes_in_flight
from megatron_samoe.planning.description import PlannedModel, unsharded_model
from megatron_samoe.planning.memory import largest_rank_memory, rank_memory
from tests.harness.kept_bytes import kept_by_autograd
from tests.harness.tables import table
from tests.harness.tiny import state_of, tiny_config, with_layout, with_options

TABLE = table(__file__)


def states_of(config: PretrainConfig, world_size: int) -> list[ParallelState]:
    """Returns all ranks' states, without any process group."""
    grid = RankGrid.of(config.parallel, world_size)
    return [state_of(grid, rank, config.parallel.sequence_parallel and grid.tp > 1) for rank in range(world_size)]


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Returns the bytes of tensors, memory that several share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def built_bytes(config: PretrainConfig, vocab_size: int, state: ParallelState) -> tuple[int, int, int]:
    """Returns the bytes of weights, main gradients and optimizer state of a rank's built model."""
    model = RankModel(config, vocab_size, state, compute_dtype(config))
    parameters = model.global_parameters()
    buffers = GradBuffers(parameters, state, config.parallel.use_distributed_optimizer)
    optimizer = MixedPrecisionOptimizer(buffers, config.optimizer)
    moments = [t for name in optimizer.masters for t in optimizer.moments(name).values()]
    return (
        storage_bytes([p.detach() for p in parameters.values()]),
        storage_bytes([b.flat for b in buffers.buffers]),
        storage_bytes([*moments, *optimizer.own_masters().values()]),
    )


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = TABLE["layouts"]
MODELS: dict[str, dict[str, Any]] = TABLE["models"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_weights_gradients_and_optimizer_equal_the_built_models(layout: str, model: str) -> None:
    world_size, sizes = LAYOUTS[layout]
    if model.startswith("dense"):
        sizes = {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    config = with_layout(tiny_config(**MODELS[model]), **sizes)
    held = []
    for state in states_of(config, world_size):
        expected = rank_memory(config, 103, world_size, state.rank)
        actual = built_bytes(config, 103, state)
        held.append((actual[2], expected.optimizer))
        optimizer: Any = expected.optimizer
        if config.optimizer.optimizer == "muon":
            # Which matrices a slice of a buffer holds is not asked: the buffer's mean is told.
            optimizer = pytest.approx(optimizer, rel=0.4 if config.parallel.use_distributed_optimizer else 1e-4)
        assert actual == (expected.weights, expected.gradients, optimizer), state.rank
    assert sum(a for a, _ in held) == pytest.approx(sum(e for _, e in held), rel=1e-4)


def test_an_exchange_of_banks_takes_what_the_largest_of_their_tensors_needs() -> None:
    """Holders of more banks than a stage has layers combine them: the weights of its four layers come, tensor by tensor."""
    config = with_layout(tiny_config("samoe", num_layers=8, num_expert_banks=5, samoe_combine="step"), pp=2)
    pool = RankModel(config, 103, states_of(config, 2)[0], torch.float32).expert_pool["combined"]
    largest = max(store.num_elements for store in pool.stores.values())
    # Beside them their gradients stand in the order of the eight layers' receivers, a half of each twice.
    assert rank_memory(config, 103, 2, 0).exchange == 4 * (4 * largest + 8 * largest)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 12), st.sampled_from(["1f1b", "gpipe"]), st.data())
def test_passes_in_flight_are_those_of_the_plan(
    pp: int, chunks: int, number: int, schedule: str, data: st.DataObject
) -> None:
    if pp == 1:
        assert passes_in_flight(schedule, 1, 0, 1, number) == 1
        return
    rank = data.draw(st.integers(0, pp - 1))
    micro_batches = number * pp if chunks > 1 else number
    plan = make_plan(schedule, pp, rank, chunks, micro_batches)
    assert passes_in_flight(schedule, pp, rank, chunks, micro_batches) == max_in_flight(plan)


def test_the_largest_rank_needs_no_less_than_any() -> None:
    config = with_layout(tiny_config("samoe"), pp=2, ep=2, zero=True)
    rank, most = largest_rank_memory(config, 103, 8)
    assert most == rank_memory(config, 103, 8, rank)
    assert most.total == max(rank_memory(config, 103, 8, r).total for r in range(8))


def layer_bytes(config: PretrainConfig) -> int:
    """Returns what the planner says that the first layer keeps."""
    training = config.training
    selective = training.recompute_granularity == "selective"
    place = all_layers(config)[0]
    return unsharded_model(config, 103).description.trace(place, training.micro_batch_size, selective).kept_bytes


#: Options of a layer's experts and attention.
LAYERS: dict[str, dict[str, Any]] = TABLE["layers"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("style", ["gpt3", "llama"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_activations_are_what_autograd_keeps(layer: str, style: str, dtype: str) -> None:
    sizes = {"style": style, "hidden_size": 64, "seq_length": 64, "ffn_hidden_size": 192, "bf16": dtype == "bf16"}
    config = tiny_config(**{**sizes, **LAYERS[layer]})
    model = build_model(config, 103, single_process_state())
    expected = layer_bytes(config)
    if config.model.normalization == "RMSNorm":
        # On a CPU torch composes RMSNorm: it keeps an fp32 product, and for bf16 an fp32 copy in place of the input.
        tokens, model_config = config.training.micro_batch_size * config.model.seq_length, config.model
        latent = model_config.kv_lora_rank if model_config.multi_latent_attention else 0
        expected += tokens * (2 * model_config.hidden_size + latent) * (4 if dtype == "fp32" else 4 + 2)
    assert kept_by_autograd(model, config) == pytest.approx(expected, rel=0.05)


def test_recomputing_keeps_layer_inputs_alone() -> None:
    config = tiny_config("dense", num_layers=8)
    inputs = config.training.micro_batch_size * config.model.seq_length * config.model.hidden_size * 4

    def activations(**options: Any) -> int:
        changed = with_options(config, **options)
        return activation_bytes(PlannedModel(changed, 103, 1), 0, 4)

    layer = layer_bytes(config)
    none, full = activations(), activations(recompute_granularity="full")
    assert none - activations(num_layers=4) == 4 * layer
    assert full - activations(num_layers=4, recompute_granularity="full") == 4 * inputs
    some = [activations(recompute_granularity="full", recompute_num_layers=n) for n in (4, 6)]
    assert some[0] - some[1] == 2 * (layer - inputs)
    assert full < some[0] < activations(recompute_granularity="selective") < none

"""Experts that layers of Megatron-Core's own model share: its results are ours, its gradients follow from its own experts', and
every layout trains as one process does; what the plug-in refuses; and the example, which learns a text."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_samoe.config.cli import from_mapping, to_mapping
from megatron_samoe.convert.fold import fold_shared
from megatron_samoe.convert.megatron import MegatronReader
from megatron_samoe.convert.megatron.rank_files import FILE_NAME
from megatron_samoe.errors import ConfigError, DataError
from megatron_samoe.models.rank_model import stored_name
from tests.harness.datasets import write_dataset
from tests.harness.megatron_files import write_rank_files
from tests.harness.megatron_model import Layout, Model, built, start
from tests.harness.megatron_training import run_megatron, saved_midway, train, trained_on
from tests.harness.near_package import near_installed  # noqa: F401
from tests.harness.pairs import first_by_day
from tests.harness.tables import table
from tests.harness.tiny import VOCAB_SIZE, global_batch, tiny_config
from tests.parity.test_megatron_checkpoints import (
    causal_mask,
    cpu_in_place_of_cuda,  # noqa: F401
    megatron_model,
    megatron_rank,
    spec_of,
)
from tests.unit.convert.memory_source import MemorySource, logits, new_source

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

TABLE = table(__file__)
#: Options with which experts are opened or closed.
CHANGES = {"pool_lock_step", "pool_lock_anneal_steps", "neighbour_unmask_steps"}
#: Ways of sharing with their options.
WAYS: dict[str, tuple[str, dict[str, Any]]] = TABLE["ways"]
TRAINED: list[str] = TABLE["trained"]
#: Layouts with the number of their ranks.
LAYOUTS = {name: (Layout(**sizes), ranks) for name, (ranks, sizes) in TABLE["layouts"].items()}


def shared_source(way: str, options: dict[str, Any]) -> tuple[MemorySource, MemorySource, dict[int, Tensor]]:
    """Returns a random model of ours, the same without factors on its experts, and the factors of each layer, if it has any."""
    sharing = {} if way == "own" else {"expert_sharing": way}
    experts = {"pool": {"num_experts": 8}, "neighbours": {"num_experts": 2}}.get(way, {})
    llama = {"style": "llama", "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_router_pre_softmax": True}
    config = {**llama, **experts}
    source = new_source(tiny_config("moe", **config, **sharing, **options))
    factors = {}
    for layer in range(4):
        if way == "near":  # as in all that were trained
            source.weights[f"layers.{layer}.moe.combination"] *= near_banks(layer, options["num_expert_banks"])
        if (name := f"layers.{layer}.moe.router.candidates") in source.weights:
            few = torch.arange(len(source.weights[name])).roll(layer) % 3 * 0.5
            factors[layer] = source.weights[name] = few
    open_to_all = {n: t for n, t in source.weights.items() if not n.endswith("candidates")}
    kept = {n: v for n, v in options.items() if n not in CHANGES}
    plain = to_mapping(tiny_config("moe", **config, **sharing, **kept))
    return source, replace(source, weights=open_to_all, config=plain), factors


def limit(router: Any, factors_E: Tensor) -> None:
    """Gives a router of Megatron-Core's own factors on its scores, softmax(z + log f)."""
    gating = router.gating
    router.gating = lambda x: gating(x) + factors_E.log()


def with_sharing(args: argparse.Namespace, way: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Returns Megatron-Core's model of a checkpoint's arguments, whose layers share their experts, and what shares them."""
    from megatron_samoe.plugins.megatron_core import ExpertSharing

    made: list[Any] = []

    def spec(config: Any) -> Any:
        made.append(ExpertSharing(config, way, **options))
        return made[0].spec(spec_of(config))

    model = megatron_model(args, spec)
    return made[0].attach(model), made[0]


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns logits [T, V], without padding."""
    tokens, length = batch["tokens"], batch["tokens"].shape[1]
    result: Tensor = model(tokens, torch.arange(length).expand_as(tokens), causal_mask(length))
    return result.flatten(0, 1)[:, :VOCAB_SIZE]


def borrowed(model: Any) -> dict[str, torch.nn.Parameter]:
    """Returns what layers share and own of their experts, by our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if name.startswith("expert_pool.part."):
            found[stored_name(f"expert_pool.{name.removeprefix('expert_pool.part.')}")] = parameter
        elif ".experts.part." in name:
            layer, _, rest = name.removeprefix("decoder.layers.").partition(".mlp.experts.part.")
            found[stored_name(f"layers.{layer}.moe.experts.{rest}")] = parameter
    return found


def effective(source: MemorySource, own: dict[str, Tensor], normalization: str) -> dict[tuple[int, str], Tensor]:
    """Returns each layer's weights W[l, e] = sum_p A[l, p] T[p, e] as functions of `own`, by layer and matrix."""
    weights = {}
    for layer in range(4):
        for row, name in enumerate(("w1", "w2")):
            a = own.get(f"layers.{layer}.moe.combination")
            if (mine := own.get(f"layers.{layer}.moe.experts.{name}")) is not None:
                weights[layer, name] = mine
                continue
            sets = [n for n in own if n.startswith("expert_pool.") and n.endswith(f".{name}")]
            bank = own[sets[min(layer * len(sets) // 4, len(sets) - 1)]]
            if a is None:
                weights[layer, name] = bank[0]
                continue
            a = a * near_banks(layer, a.shape[-1]) if any(".near." in name for name in own) else a
            a = a.softmax(-1) if normalization == "softmax" else a
            a = a / a.norm(dim=-1, keepdim=True) if normalization == "l2" else a
            mixed = a[row].expand(bank.shape[1], -1)
            weights[layer, name] = torch.einsum("ep,pe...->e...", mixed, bank)
    return weights


def near_banks(layer: int, banks: int) -> Tensor:
    """Returns 1 for the two banks around a layer's depth, of four layers; see tests/extending/near_banks.py."""
    nearest = min(int((layer + 0.5) / 4 * banks), banks - 1)
    first = min(max(nearest - 1, 0), banks - 2)
    return torch.tensor([float(first <= bank < first + 2) for bank in range(banks)])


@pytest.mark.parametrize("case", WAYS)
def test_its_loss_and_gradients_are_those_of_megatrons_own_experts(case: str, tmp_path: Path) -> None:
    """The loss is ours, too. Megatron-Core's gradient of each expert it owns gives that of banks and coefficients, by autograd
    through W = A T, written out here."""
    way, options = WAYS[case]
    source, plain, factors = shared_source(way, options)
    folded = plain if way == "own" else fold_shared(plain)
    exported = write_rank_files(folded, tmp_path, fused=False)
    content = torch.load(exported / "mp_rank_00" / FILE_NAME, weights_only=False)
    batch = global_batch(from_mapping(source.config, "test"), 0)
    with megatron_rank(content["args"], 0):
        reference = megatron_model(content["args"])
        reference.load_state_dict(content["model"], strict=True)
        model, sharing = with_sharing(content["args"], way, options)
        missing, left = model.load_state_dict(content["model"], strict=False)
        shared = borrowed(model)
        changing = {name for name in missing if name.endswith(("router.candidates", "router.steps"))}
        assert all("experts" in name for name in left) and len(missing) == len(shared) + len(changing)
        assert bool(changing) == bool(factors)
        for layer, factors_E in factors.items():
            limit(reference.decoder.layers[layer].mlp.router, factors_E)
            model.decoder.layers[layer].mlp.router.candidates.copy_(factors_E)
        for name, parameter in shared.items():
            parameter.data.copy_(source.weights[name].view_as(parameter))
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        sharing.forget()
        expected, found = logits_of(reference.eval(), batch), logits_of(model.eval(), batch)
        for result in (expected, found):
            torch.nn.functional.cross_entropy(result, batch["labels"].flatten()).backward()
        sharing._lender.finish_step()
        for parameter in shared.values():
            parameter.data.mul_(0.5)
        sharing.forget()
        halved = logits_of(model, batch)
        for parameter in shared.values():
            parameter.data.mul_(2.0)
    assert (halved - found).abs().max() > 1e-3, "what layers use follows from what the optimizer has changed"
    torch.testing.assert_close(found, logits(source), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    own = {name: parameter.detach().clone().requires_grad_() for name, parameter in shared.items()}
    total = torch.zeros(())
    for (layer, name), weight in effective(source, own, str(options.get("samoe_normalization", "none"))).items():
        experts, end = f"decoder.layers.{layer}.mlp.experts.local_experts.", f".linear_fc{name[1]}.weight"
        grads = torch.stack([theirs[f"{experts}{e}{end}"].grad for e in range(len(weight))])
        total = total + (weight * grads.view_as(weight)).sum()
    total.backward()
    for name, parameter in shared.items():
        grad = parameter.main_grad if parameter.grad is None else parameter.main_grad + parameter.grad
        torch.testing.assert_close(grad, own[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    assert len(shared) >= 2


@functools.cache
def one_process(is_moe: tuple[int, ...] = (1, 1, 1, 1)) -> dict[str, Any]:
    """Returns the results of each way in one process, of a model some of whose layers have experts."""
    ways = [*TRAINED, BY_EXPERT] if all(is_moe) else FEW
    (found,) = run_megatron(train, 1, Layout(options={"moe_layer_freq": list(is_moe)}), [WAYS[case] for case in ways])
    return dict(zip(ways, found, strict=True))


BY_EXPERT = "8 banks of each expert"
#: A map names a source for each of four layers.
FEW = [way for way in TRAINED if way != "map"]
#: By day each axis, and each way of sharing in two layouts.
BY_DAY = (
    ("EP 2 x uneven PP 2, ZeRO-1, overlap", TRAINED),
    ("TP 2 + SP, ETP 2", TRAINED[::2]),
    ("interleaved PP 2, recomputed", TRAINED[1::2]),
    ("TP 2 + SP, ZeRO-1", ["locked pool", BY_EXPERT]),
    ("TP 2 + SP, EP 2", [BY_EXPERT]),
)


@pytest.mark.parametrize(
    ("layout", "ways"), first_by_day([*BY_DAY, *((layout, TRAINED) for layout in list(LAYOUTS)[1:])], len(BY_DAY))
)
def test_a_layout_trains_as_one_process(layout: str, ways: list[str]) -> None:
    """Four steps with clipping, each way: by Megatron-Core's data parallelism, optimizer and schedule, which the harness calls by
    name. Losses, norms and copies of what is shared are those of one process."""
    sizes, ranks = LAYOUTS[layout]
    expected = one_process(tuple(sizes.options.get("moe_layer_freq", (1, 1, 1, 1))))
    ways = [way for way in ways if way in expected]
    for found in run_megatron(train, ranks, sizes, [WAYS[way] for way in ways]):
        for way, result in zip(ways, found, strict=True):
            for name in ("losses", "norms"):
                assert result[name] == pytest.approx(expected[way][name], rel=2e-6), (way, name)
            assert not any(result["copies"].values()) and not result["idle"] and not result["unmoved"], way


def test_an_experts_moments_move_with_its_weights() -> None:
    candidates = importlib.import_module("megatron_samoe.plugins.megatron_core.candidates")
    p = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    adam = torch.optim.Adam([p])
    p.grad = p.detach() ** 3
    adam.step()
    p.main_grad = torch.arange(12.0).view(3, 4)  # type: ignore[attr-defined]
    order = torch.tensor([2, 0, 1])
    tensors = [p.data, adam.state[p]["exp_avg"], adam.state[p]["exp_avg_sq"], p.main_grad]
    expected = [tensor[order].clone() for tensor in tensors]
    candidates.reorder(argparse.Namespace(optimizer=adam), p, 0, order, is_split=False)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


@pytest.mark.night
def test_bf16_trains_as_fp32_does_nearly() -> None:
    """Adam's masters are Megatron-Core's; a step of bf16 is 2^-8 of a weight."""
    layout = Layout(ep=2, pp=2, zero=True, overlap=True, options=BF16)
    for found in run_megatron(train, 4, layout, [WAYS[case] for case in TRAINED]):
        for case, result in zip(TRAINED, found, strict=True):
            assert result["losses"] == pytest.approx(one_process()[case]["losses"], rel=2e-3), case
            assert result["norms"] == pytest.approx(one_process()[case]["norms"], rel=2e-2), case
            assert not any(result["copies"].values()) and not result["idle"]


@pytest.mark.night
@pytest.mark.parametrize("case", ["2 banks", "tied", "map", "locked pool", "of another package"])
def test_training_goes_on_in_another_layout(case: str, tmp_path: Path) -> None:
    """Two steps in EP 2 x PP 2, saved with the optimizer, and two in TP 2: the four steps of one process. What was combined before
    loading is combined anew.

    Without the distributed optimizer: Megatron-Core's reader of its state takes Transformer Engine's Adam, not torch's.
    """
    run_megatron(saved_midway, 4, Layout(ep=2, pp=2), *WAYS[case], str(tmp_path))
    for found in run_megatron(trained_on, 2, Layout(tp=2), *WAYS[case], str(tmp_path)):
        for name, values in found.items():
            assert values == pytest.approx(one_process()[case][name][2:], rel=2e-6), name


ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/megatron_core/pretrain_pool.py"


#: Options of Megatron-Core's model, a way of sharing, its options, and what is said.
REFUSED: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    *table(__file__)["refused"],
    ({"activation_func": torch.nn.functional.relu}, "tied", {}, "activation_func = 'relu': must be gated SiLU"),
]


def _all_refusals() -> list[str]:
    """Returns what is said of each, of a model that was built by another spec, of one that is not wrapped, and of one of another
    ExpertSharing."""
    start(Layout())
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_samoe.plugins.megatron_core import ExpertSharing

    def said(use: Callable[..., object], *words: object) -> str:
        try:
            use(*words)
        except ConfigError as error:
            return str(error)
        return "accepted"

    found = [
        said(built, Layout(options=options), Model(sharing=sharing, sharing_options=words))
        for options, sharing, words, _ in REFUSED
    ]
    config, (model,), sharing = built(Layout(), Model(sharing="tied"))
    _, (other,), _ = built(Layout(), Model())
    _, (fewer,), _ = built(Layout(options={"moe_layer_freq": [0, 1, 1, 1]}), Model(sharing="tied"))
    found += [said(sharing.attach, other), said(sharing.attach, fewer), said(sharing.finalize_model_grads, [model])]
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    return [*found, said(ExpertSharing(config, "tied").finalize_model_grads, [wrapped])]


def test_wrong_use_is_one_sentence() -> None:
    later = (
        "build it by ExpertSharing.spec",
        "spec = 'layer 0': must have experts where the config's",
        "model = 'GPTModel': must be wrapped in Megatron-Core's DistributedDataParallel",
        "model = '1 chunks': must be attached to one ExpertSharing",
    )
    expected = [*(said for *_, said in REFUSED), *later]
    for part, message in zip(expected, run_megatron(_all_refusals, 1)[0], strict=True):
        assert part in message and "\n" not in message, message


def test_without_megatron_core_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    for name in [name for name in sys.modules if name.startswith("megatron_samoe.plugins.megatron_core")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DataError, match=r"needs the package megatron: .*megatron-core"):
        importlib.import_module("megatron_samoe.plugins.megatron_core")


def _example(words: tuple[str, ...]) -> str:
    """Runs a program as torchrun's only rank; returns what it prints."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    sys.argv, said = [*words], io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return said.getvalue()


def _under_torchrun(ranks: int, words: tuple[str, ...]) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*torchrun, "tests/harness/run_on_cpu.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FOUR = ("--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--use-distributed-optimizer")
#: Ranks, and words of the example's command line.
EXAMPLES = [(1, ("--train-iters", "10")), (4, FOUR), (2, ("--expert-sharing", "none"))]


@pytest.mark.parametrize(("ranks", "words"), first_by_day(EXAMPLES))
def test_the_example_learns_a_text(ranks: int, words: tuple[str, ...], tmp_path: Path) -> None:
    """Bytes that repeat, by Megatron-Core's data set: the loss begins at that of a guess and falls."""
    write_dataset(tmp_path / "corpus", [[*b"one two three four " * 40, 256]] * 40)
    given = {"--train-iters": 20, "--seq-length": 32, "--data-path": tmp_path / "corpus", "--save": tmp_path / "saved"}
    words = (EXAMPLE, *(str(word) for pair in given.items() for word in pair), *words)
    said = run_megatron(_example, 1, words)[0] if ranks == 1 else _under_torchrun(ranks, words)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+),", said, re.MULTILINE)]
    assert losses[0] == pytest.approx(np.log(257), abs=0.2) and losses[-1] < losses[0] - 1
    ids = torch.tensor(list(b"one two three four " * 2)[:33])
    ours = logits(MegatronReader(tmp_path / "saved"), tokens=ids[None, :-1])[:, :257]
    assert float(torch.nn.functional.cross_entropy(ours, ids[1:])) == pytest.approx(losses[-1], abs=0.5)

"""The surgery tool's command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_samoe.cli.arguments import Options, Words, adder, program
from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, write_checkpoint
from megatron_samoe.errors import CheckpointError, ConfigError
from megatron_samoe.interop.edited_model import EditedModel, model_names, open_checkpoint
from megatron_samoe.interop.hf.export import refuse_other_tensors
from megatron_samoe.interop.pool_surgery import SetOptions, pool_moe, tie_layers
from megatron_samoe.interop.student_surgery import keep_layers
from megatron_samoe.interop.unpool_surgery import fold_shared, select_samoe, tie_selected
from megatron_samoe.interop.upcycle import UpcycleOptions, upcycle_dense


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    options = make_parser().parse_args(words)
    source = open_checkpoint(options.load_dir, options.ckpt_step)
    iteration = int(source.train_state.get("iteration", 0))
    target = store.iteration_dir(options.save_dir, iteration)
    if target.exists():
        raise CheckpointError(f"{target} exists; give another --save-dir.")
    edited = _edit(source, options)
    print("\n".join(edited.report))
    print(_sizes(source, edited))
    if options.dry_run:
        print("Nothing is written (--dry-run).")
        return
    written = write_checkpoint(Path(options.save_dir), iteration, edited)
    shown = shlex.quote(options.save_dir)
    print(f"Written to {written}, without optimizer state. To train on:\n"
          f"  python -m megatron_samoe.cli.pretrain --pretrained-checkpoint {shown} --use-checkpoint-args ...")  # fmt: skip


def _edit(source: CheckpointReader, options: Options) -> EditedModel:
    refuse_other_tensors(source)
    if options.action == "pool":
        return pool_moe(source, options.num_expert_banks, options.samoe_granularity, options.expert_sharing)
    if options.action == "tie":
        layers = None if options.sets_from == "average" else _numbers("--sets-from", options.sets_from)
        sets = SetOptions(options.num_expert_sets, options.untied_ends, layers)
        return tie_layers(source, options.expert_sharing, sets)
    if options.action == "fold":
        return fold_shared(source)
    if options.action == "select":
        return (select_samoe if options.to == "banks" else tie_selected)(source, options.scale)
    if options.action == "student":
        return keep_layers(source, _numbers("--keep-layers", options.keep_layers))
    names = ("expert_layout", "num_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function",
             "moe_layer_freq", "moe_ffn_hidden_size", "num_expert_banks", "samoe_granularity", "samoe_init")  # fmt: skip
    default = MoEConfig()
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    moe = MoEConfig(**{n: getattr(default, n) if value is None else value for n, value in given.items()})
    return upcycle_dense(
        source, UpcycleOptions(moe, options.dense_mlp, options.noise, options.router_std, options.seed)
    )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    parts = text.replace(" ", "").split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise ConfigError(flag, text, "must be numbers of layers between commas, such as 0,2,4")
    return tuple(map(int, parts))


def _sizes(source: CheckpointReader, edited: EditedModel) -> str:
    (count, num_bytes), (new_count, new_bytes) = _size(source), _size(edited)
    dropped = sum(name.startswith("optimizer.") for name in source.tensors)
    return (
        f"{count:,} parameters ({num_bytes / 1e6:,.1f} MB) become {new_count:,} ({new_bytes / 1e6:,.1f} MB); "
        f"{dropped} tensors of optimizer state are dropped."
    )


def _size(model: CheckpointReader | EditedModel) -> tuple[int, int]:
    """Returns elements and bytes of a model's weights."""
    stored = [model.tensors[name] for name in model_names(model)]
    return sum(t.num_elements for t in stored), sum(t.num_bytes for t in stored)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description="Makes another model from a trained one.")
    actions = parser.add_subparsers(dest="action", required=True)
    common = argparse.ArgumentParser(add_help=False)
    add = adder(common)
    add("--load-dir", str, "folder of checkpoints, or one checkpoint's folder", required=True)
    add("--ckpt-step", int, "iteration; the newest if not given")
    add("--save-dir", str, "folder to write the new checkpoint in", required=True)
    add("--dry-run", bool, "say what would be done, and write nothing")

    def action(name: str, text: str) -> Callable[..., argparse.Action]:
        return adder(actions.add_parser(name, parents=[common], help=text, description=text))

    upcycle = action("upcycle", "a dense model becomes a MoE or a SaMoE that computes the same")
    upcycle("--expert-layout", ("moe", "samoe"), required=True)
    upcycle("--num-experts", int, required=True, metavar="E")
    upcycle("--moe-router-topk", 1, metavar="K")
    upcycle("--moe-router-pre-softmax", bool, "weigh experts by their score among all experts; derived if not given: true "
            "for top-1", action=argparse.BooleanOptionalAction, default=None)  # fmt: skip
    upcycle("--moe-router-score-function", ("softmax", "sigmoid"))
    upcycle("--moe-layer-freq", "1", "which layers get experts")
    upcycle("--moe-ffn-hidden-size", int, "width of new experts, with --dense-mlp shared-expert")
    upcycle("--num-expert-banks", int, metavar="P")
    _add_granularity(upcycle)
    upcycle("--samoe-init", ("cyclic", "block", "uniform"), default=None)
    upcycle("--dense-mlp", ("experts", "shared-expert"), "experts: each is a copy; shared-expert: the MLP serves all tokens, "
            "beside new experts that begin at 0")  # fmt: skip
    upcycle("--noise", 0.0, "added to each copy, as a share of the weights' own spread")
    upcycle("--router-std", float, "spread of the routers' weights; derived if not given")
    upcycle("--seed", 1234)
    pool = action("pool", "a MoE becomes the nearest SaMoE")
    pool("--num-expert-banks", int, required=True, metavar="P")
    pool(
        "--expert-sharing",
        "combined",
        "layers that combine banks, such as own,combined*6,own; all if not given",
        metavar="MAP",
    )
    _add_granularity(pool)
    tie = action("tie", "layers of a MoE come to use sets of experts, the nearest to their own")
    tie(
        "--expert-sharing",
        str,
        "tied, scaled, pool, or a map such as 0,1,1,1,2 or scaled:0*4,1*4",
        required=True,
        metavar="MAP",
    )
    tie("--num-expert-sets", 1, "sets of tied or scaled", metavar="N")
    tie("--untied-ends", 0, "first and last MoE layers that keep their own", metavar="N")
    tie(
        "--sets-from",
        "average",
        "average, or for each set the layer whose experts it takes, such as 0,4",
        metavar="LAYERS",
    )
    action("fold", "a model whose layers share experts becomes the plain MoE that computes the same")
    select = action("select", "each layer takes one bank, or its set without a factor")
    select(
        "--scale",
        ("keep", "one"),
        "keep: the bank keeps its coefficient; one: it becomes 1, the layer is exactly a bank",
    )
    select("--to", ("banks", "tied"), "banks: a SaMoE with one-hot coefficients; tied: sets that layers use as they are, where "
           "--scale keep is for w2 alone and moves into the weights of routing")  # fmt: skip
    student = action("student", "a model of fewer layers starts from chosen ones")
    student("--keep-layers", str, "rising numbers, such as 0,2,4", required=True, metavar="LAYERS")
    return parser


def _add_granularity(add: Callable[..., argparse.Action]) -> None:
    add("--samoe-granularity", ("layer", "expert"), "coefficients per layer, or per layer and expert")


if __name__ == "__main__":
    sys.exit(main())

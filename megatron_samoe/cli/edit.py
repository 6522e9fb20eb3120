"""The surgery tool's command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_samoe.config.moe import MoEConfig
from megatron_samoe.dist_checkpointing import store
from megatron_samoe.dist_checkpointing.global_tensors import CheckpointReader, GlobalTensors, write_checkpoint
from megatron_samoe.errors import CheckpointError, ConfigError, MegatronSamoeError
from megatron_samoe.interop.edited_model import EditedModel, model_names, open_checkpoint
from megatron_samoe.interop.hf.export import refuse_other_tensors
from megatron_samoe.interop.pool_surgery import SetOptions, pool_moe, tie_layers
from megatron_samoe.interop.student_surgery import keep_layers
from megatron_samoe.interop.unpool_surgery import fold_shared, select_samoe, tie_selected
from megatron_samoe.interop.upcycle import UpcycleOptions, upcycle_dense


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status."""
    options = make_parser().parse_args(argv)
    try:
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
            return 0
        written = write_checkpoint(Path(options.save_dir), iteration, edited)
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    shown = shlex.quote(options.save_dir)
    print(f"Written to {written}, without optimizer state. To train on:\n"
          f"  python -m megatron_samoe.cli.pretrain --pretrained-checkpoint {shown} --use-checkpoint-args ...")  # fmt: skip
    return 0


def _edit(source: CheckpointReader, options: argparse.Namespace) -> EditedModel:
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
        return (tie_selected if options.to == "tied" else select_samoe)(source, options.scale)
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


def _sizes(source: GlobalTensors, edited: EditedModel) -> str:
    names, new_names = model_names(source), model_names(edited)
    count = sum(_elements(source, name) for name in names)
    new_count = sum(_elements(edited, name) for name in new_names)
    size = sum(source.tensors[name].num_bytes for name in names)
    new_size = sum(edited.tensors[name].num_bytes for name in new_names)
    dropped = sum(name.startswith("optimizer.") for name in source.tensors)
    return (
        f"{count:,} parameters ({size / 1e6:,.1f} MB) become {new_count:,} ({new_size / 1e6:,.1f} MB); "
        f"{dropped} tensors of optimizer state are dropped."
    )


def _elements(source: GlobalTensors, name: str) -> int:
    stored = source.tensors[name]
    return stored.num_bytes // stored.dtype.itemsize


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description="Makes another model from a trained one.")
    actions = parser.add_subparsers(dest="action", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--load-dir", required=True, help="folder of checkpoints, or one checkpoint's folder")
    common.add_argument("--ckpt-step", type=int, help="iteration; the newest if not given")
    common.add_argument("--save-dir", required=True, help="folder to write the new checkpoint in")
    common.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")

    def action(name: str, text: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, parents=[common], help=text, description=text)

    _add_upcycle_options(action("upcycle", "a dense model becomes a MoE or a SaMoE that computes the same"))
    pool = action("pool", "a MoE becomes the nearest SaMoE")
    pool.add_argument("--num-expert-banks", type=int, required=True, metavar="P")
    pool.add_argument("--expert-sharing", default="combined", metavar="MAP",
                      help="which layers combine banks, such as own,combined*6,own; all if not given")  # fmt: skip
    _add_granularity(pool)
    tie = action("tie", "layers of a MoE come to use sets of experts, the nearest to their own")
    tie.add_argument("--expert-sharing", required=True, metavar="MAP",
                     help="tied, scaled, pool, or a map such as 0,1,1,1,2 or scaled:0*4,1*4")  # fmt: skip
    tie.add_argument("--num-expert-sets", type=int, default=1, metavar="N", help="sets of tied or scaled")
    tie.add_argument(
        "--untied-ends", type=int, default=0, metavar="N", help="first and last MoE layers that keep their own"
    )
    tie.add_argument("--sets-from", default="average", metavar="LAYERS",
                     help="average, or for each set the layer whose experts it takes, such as 0,4")  # fmt: skip
    action("fold", "a model whose layers share experts becomes the plain MoE that computes the same")
    select = action("select", "each layer takes one bank, or its set without a factor")
    select.add_argument("--scale", choices=("keep", "one"), default="keep",
                        help="keep: the bank keeps its coefficient; one: it becomes 1, the layer is exactly a bank")  # fmt: skip
    select.add_argument("--to", choices=("banks", "tied"), default="banks",
                        help="banks: a SaMoE with one-hot coefficients; tied: sets that layers use as they are, where --scale "
                        "keep is for w2 alone and moves into the weights of routing")  # fmt: skip
    student = action("student", "a model of fewer layers starts from chosen ones")
    student.add_argument("--keep-layers", required=True, metavar="LAYERS", help="rising numbers, such as 0,2,4")
    return parser


def _add_granularity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samoe-granularity", choices=("layer", "expert"), default="layer",
                        help="coefficients per layer, or per layer and expert")  # fmt: skip


def _add_upcycle_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--expert-layout", choices=("moe", "samoe"), required=True)
    add("--num-experts", type=int, required=True, metavar="E")
    add("--moe-router-topk", type=int, default=1, metavar="K")
    add("--moe-router-pre-softmax", action=argparse.BooleanOptionalAction, default=None,
        help="weigh experts by their score among all experts; derived if not given: true for top-1")  # fmt: skip
    add("--moe-router-score-function", choices=("softmax", "sigmoid"), default="softmax")
    add("--moe-layer-freq", default="1", help="which layers get experts")
    add("--moe-ffn-hidden-size", type=int, help="width of new experts, with --dense-mlp shared-expert")
    add("--num-expert-banks", type=int, metavar="P")
    _add_granularity(parser)
    add("--samoe-init", choices=("cyclic", "block", "uniform"))
    add("--dense-mlp", choices=("experts", "shared-expert"), default="experts",
        help="experts: each is a copy; shared-expert: the MLP serves all tokens, beside new experts that begin at 0")  # fmt: skip
    add("--noise", type=float, default=0.0, help="added to each copy, as a share of the weights' own spread")
    add("--router-std", type=float, help="spread of the routers' weights; derived if not given")
    add("--seed", type=int, default=1234)


if __name__ == "__main__":
    sys.exit(main())

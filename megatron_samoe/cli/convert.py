"""The conversion tool's command line: from any family of checkpoints to any, tensor by tensor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_samoe.errors import ConfigError, MegatronSamoeError
from megatron_samoe.interop.convert_source import DTYPES, KINDS, Kind, Source, open_source
from megatron_samoe.interop.convert_target import Conversion, HFOptions, plan_hf, plan_megatron, plan_native
from megatron_samoe.interop.hf.target import TARGETS
from megatron_samoe.interop.megatron import MegatronLayout, MegatronStyle

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DESCRIPTION = """Converts a model between this program's checkpoints, Megatron-LM's per-rank files (format torch) and Hugging
Face folders. Both families are found out: the source's from its files; the target is Megatron's if a --target-* size is
given, Hugging Face's if one of its options is, and else a checkpoint of this program, unless that is what the source is.
Weights only: optimizer state stays behind."""
#: Options that choose a target and mean nothing for the others.
_MEGATRON = {
    "target_tensor_parallel_size": 1, "target_pipeline_parallel_size": 1, "target_expert_parallel_size": 1,
    "target_expert_tensor_parallel_size": None, "target_virtual_pipeline_parallel_size": 1,
    "transformer_impl": "transformer_engine", "expert_format": "grouped",
    "release": False,
}  # fmt: skip
_HF = {"hf_model_type": "auto", "fold": False, "max_shard_size": "5GB"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status."""
    options = make_parser().parse_args(argv)
    try:
        source = open_source(Path(options.load_dir), options.source, options.ckpt_step, options.vocab_size)
        conversion = _plan(source, options)
        lines = [f"From {source.described}.", *source.notes, f"To {conversion.described}.", *conversion.lines]
        print("\n".join(lines))
        if options.dry_run:
            print("\n".join([*conversion.listing(), "Nothing is written (--dry-run)."]))
            return 0
        written = _run(conversion)
    except MegatronSamoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(f"Written to {written}.{conversion.hint}")
    return 0


def _plan(source: Source, options: argparse.Namespace) -> Conversion:
    target = _target(source, options)
    save_dir, dtype = Path(options.save_dir), DTYPES.get(options.dtype)
    if target == "native":
        return plan_native(source, save_dir, dtype, not options.no_tokenizer)
    if target == "megatron":
        layout = _layout({name: _given(options, name, _MEGATRON) for name in _MEGATRON})
        return plan_megatron(source, save_dir, dtype, layout, bool(options.release))
    hf = HFOptions(
        _given(options, "hf_model_type", _HF), bool(options.fold), _bytes(_given(options, "max_shard_size", _HF)),
        not options.no_tokenizer,
    )  # fmt: skip
    return plan_hf(source, save_dir, dtype, hf)


def _layout(options: Mapping[str, Any]) -> MegatronLayout:
    return MegatronLayout(
        tensor_parallel=options["target_tensor_parallel_size"],
        pipeline_parallel=options["target_pipeline_parallel_size"],
        expert_parallel=options["target_expert_parallel_size"],
        expert_tensor_parallel=options["target_expert_tensor_parallel_size"],
        virtual_pipeline=options["target_virtual_pipeline_parallel_size"],
        style=MegatronStyle(options["transformer_impl"], options["expert_format"]),
    )


def _target(source: Source, options: argparse.Namespace) -> Kind:
    """Returns the target's family.

    Raises:
        ConfigError: it is not known, is the source's, or an option is for another.
    """
    for_megatron, for_hf = (_flags_given(options, group) for group in (_MEGATRON, _HF))
    target = options.target
    if target == "auto":
        if not for_megatron and not for_hf and source.kind == "native":
            raise ConfigError(
                "--to", "auto", "this program's checkpoints load in any layout as they are; say megatron or hf"
            )
        target = "megatron" if for_megatron else "hf" if for_hf else "native"
    if target == source.kind == "native":
        raise ConfigError("--to", target, "the source is one already, and loads in any layout as it is")
    for family, given in (("megatron", for_megatron), ("hf", for_hf)):
        if given and target != family:
            raise ConfigError(given[0], _value(options, given[0]), f"is for --to {family}, not {target}")
    if options.no_tokenizer and target == "megatron":
        raise ConfigError("--no-tokenizer", True, "is for --to hf and --to native: Megatron's files hold none")
    return target


def _flags_given(options: argparse.Namespace, group: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in group if getattr(options, name) is not None]


def _value(options: argparse.Namespace, flag: str) -> object:
    return getattr(options, flag.removeprefix("--").replace("-", "_"))


def _given(options: argparse.Namespace, name: str, group: dict[str, Any]) -> Any:
    value = getattr(options, name)
    return group[name] if value is None else value


def _bytes(text: str) -> int:
    """Returns a size such as 5GB or 500MiB in bytes, as transformers writes them."""
    number = text.upper().rstrip("KMGIB")
    try:
        size = int(float(number) * _UNITS[text.upper()[len(number) :]])
    except (KeyError, ValueError, OverflowError):
        raise ConfigError("--max-shard-size", text, "must be a number and KB, MB, GB, KiB, MiB or GiB") from None
    if size < 1:
        raise ConfigError("--max-shard-size", text, "must be positive")
    return size


def _run(conversion: Conversion) -> Path:
    with tqdm(total=conversion.num_bytes, unit="B", unit_scale=True, desc="convert", mininterval=0.5) as bar:
        return conversion.write(bar.update)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--load-dir", required=True, help="checkpoint folder, one iteration's folder, or Hugging Face folder")
    add("--save-dir", required=True, help="where to write; nothing that is there is overwritten")
    add("--from", dest="source", choices=("auto", *KINDS), default="auto", help="family of the source")
    add("--to", dest="target", choices=("auto", *KINDS), default="auto", help="family of the target")
    add("--ckpt-step", type=int, help="iteration to convert; the newest if not given")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="precision to write; as stored if not given")
    add("--vocab-size", type=int, help="tokens that exist, where Megatron's files do not tell")
    add("--no-tokenizer", action="store_true", help="convert without the tokenizer")
    add("--dry-run", action="store_true", help="print the plan and write nothing")
    megatron = parser.add_argument_group("to Megatron").add_argument
    megatron("--target-tensor-parallel-size", type=int, metavar="N", help="1 if not given, as for the next two")
    megatron("--target-pipeline-parallel-size", type=int, metavar="N")
    megatron("--target-expert-parallel-size", type=int, metavar="N")
    megatron("--target-expert-tensor-parallel-size", type=int, metavar="N", help="1 or the tensor-parallel size")
    megatron(
        "--target-virtual-pipeline-parallel-size",
        type=int,
        metavar="N",
        help="chunks of each pipeline rank; 1 if not given",
    )
    megatron(
        "--transformer-impl", choices=("transformer_engine", "local"), help="whose module names; Megatron's default"
    )
    megatron("--expert-format", choices=("grouped", "sequential", "legacy_grouped"),
             help="TEGroupedMLP (default), SequentialMLP or GroupedMLP")  # fmt: skip
    megatron(
        "--release", action="store_true", default=None, help="write it as Megatron's release rather than an iteration"
    )
    hf = parser.add_argument_group("to Hugging Face").add_argument
    hf("--hf-model-type", choices=TARGETS, metavar="TYPE",
       help=f"{', '.join(TARGETS)}; auto (default) takes a stock class that computes the same function, or our own")  # fmt: skip
    hf("--fold", action="store_true", default=None, help="fold the pool into each layer's own experts")
    hf("--max-shard-size", metavar="SIZE", help="of one weight file, such as 5GB (default) or 500MiB")
    return parser


if __name__ == "__main__":
    sys.exit(main())

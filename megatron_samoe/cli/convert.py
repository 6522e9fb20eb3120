"""The conversion tool's command line: from any family of checkpoints to any, tensor by tensor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_samoe.cli.arguments import Options, Words, adder, program
from megatron_samoe.config.derived import flag
from megatron_samoe.convert.hf.target import targets
from megatron_samoe.convert.megatron import MegatronLayout, MegatronStyle
from megatron_samoe.convert.source import DTYPES, KINDS, TARGETS, Source, TargetKind, open_source
from megatron_samoe.convert.target import Conversion, HFOptions, plan_gguf, plan_hf, plan_megatron, plan_native
from megatron_samoe.errors import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DESCRIPTION = """Converts a model between this program's checkpoints, Megatron-LM's per-rank files (format torch) and Hugging
Face folders. Both families are found out: the source's from its files; the target is Megatron's if a --target-* size is
given, Hugging Face's if one of its options is, and else a checkpoint of this program, unless that is what the source is.
--to gguf writes llama.cpp's file. Weights only: optimizer state stays behind."""
#: Options that size a target of Megatron's, and what its layout calls them.
_SIZES = {
    "target_tensor_parallel_size": "tensor_parallel", "target_pipeline_parallel_size": "pipeline_parallel",
    "target_expert_parallel_size": "expert_parallel", "target_expert_tensor_parallel_size": "expert_tensor_parallel",
    "target_virtual_pipeline_parallel_size": "virtual_pipeline",
}  # fmt: skip
#: Options that choose a target and mean nothing for the others, and what they are if not given.
_MEGATRON = {
    **dict.fromkeys(_SIZES, 1), "target_expert_tensor_parallel_size": None,
    "transformer_impl": "transformer_engine", "expert_format": "grouped", "release": False,
}  # fmt: skip
_HF = {"hf_model_type": "auto", "fold": False, "max_shard_size": "5GB"}


@program
def main(words: Words) -> None:
    """Runs the command and returns its exit status."""
    options = make_parser().parse_args(words)
    source = open_source(Path(options.load_dir), options.source, options.ckpt_step, options.vocab_size)
    conversion = _plan(source, options)
    lines = [f"From {source.described}.", *source.notes, f"To {conversion.described}.", *conversion.lines]
    print("\n".join(lines))
    if options.dry_run:
        print("\n".join([*conversion.listing(), "Nothing is written (--dry-run)."]))
        return
    with tqdm(total=conversion.num_bytes, unit="B", unit_scale=True, desc="convert", mininterval=0.5) as bar:
        written = conversion.write(bar.update)
    print(f"Written to {written}.{conversion.hint}")


def _plan(source: Source, options: Options) -> Conversion:
    given = {name: value for name, value in vars(options).items() if value is not None}
    target = _target(source, options, given)
    save_dir, dtype, carries_tokenizer = Path(options.save_dir), DTYPES.get(options.dtype), not options.no_tokenizer
    if target == "native":
        return plan_native(source, save_dir, dtype, carries_tokenizer)
    chosen = {**_MEGATRON, **_HF, **given}
    if target == "gguf":
        return plan_gguf(source, save_dir, dtype, carries_tokenizer)
    if target == "megatron":
        style = MegatronStyle(chosen["transformer_impl"], chosen["expert_format"])
        layout = MegatronLayout(style=style, **{field: chosen[name] for name, field in _SIZES.items()})
        return plan_megatron(source, save_dir, dtype, layout, chosen["release"])
    hf = HFOptions(chosen["hf_model_type"], chosen["fold"], _bytes(chosen["max_shard_size"]), carries_tokenizer)
    return plan_hf(source, save_dir, dtype, hf)


def _target(source: Source, options: Options, given: Mapping[str, Any]) -> TargetKind:
    """Returns the target's family.

    Raises:
        ConfigError: it is not known, is the source's, or an option is for another.
    """
    of_family: dict[TargetKind, list[str]] = {
        "megatron": [name for name in _MEGATRON if name in given],
        "hf": [name for name in _HF if name in given],
    }
    target: TargetKind = options.target
    if options.target == "auto":
        target = next((family for family, names in of_family.items() if names), "native")
        if target == source.kind == "native":
            raise ConfigError(
                "--to", "auto", "this program's checkpoints load in any layout as they are; say megatron or hf"
            )
    if target == source.kind == "native":
        raise ConfigError("--to", target, "the source is one already, and loads in any layout as it is")
    for family, names in of_family.items():
        if names and target != family:
            raise ConfigError(flag(names[0]), given[names[0]], f"is for --to {family}, not {target}")
    if options.no_tokenizer and target == "megatron":
        raise ConfigError("--no-tokenizer", True, "is for --to hf, gguf and native: Megatron's files hold none")
    return target


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


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION, allow_abbrev=False)
    add = adder(parser)
    add("--load-dir", str, "checkpoint folder, one iteration's folder, or Hugging Face folder", required=True)
    add("--save-dir", str, "where to write; nothing that is there is overwritten", required=True)
    add("--from", ("auto", *KINDS), "family of the source", dest="source")
    add("--to", ("auto", *TARGETS), "family of the target", dest="target")
    add("--ckpt-step", int, "iteration to convert; the newest if not given")
    add("--dtype", ("auto", *DTYPES), "precision to write; as stored if not given")
    add("--vocab-size", int, "tokens that exist, where Megatron's files do not tell")
    add("--no-tokenizer", bool, "convert without the tokenizer")
    add("--dry-run", bool, "print the plan and write nothing")
    megatron = adder(parser.add_argument_group("to Megatron"))
    helps = ("1 if not given, as for the next two", None, None, "1 or the tensor-parallel size",
             "chunks of each pipeline rank; 1 if not given")  # fmt: skip
    for name, text in zip(_SIZES, helps, strict=True):
        megatron(flag(name), int, text, metavar="N")
    megatron(
        "--transformer-impl", ("transformer_engine", "local"), "whose module names; Megatron's default", default=None
    )
    megatron("--expert-format", ("grouped", "sequential", "legacy_grouped"), "TEGroupedMLP (default), SequentialMLP or "
             "GroupedMLP", default=None)  # fmt: skip
    megatron("--release", bool, "write it as Megatron's release rather than an iteration", default=None)
    hf = adder(parser.add_argument_group("to Hugging Face"))
    hf("--hf-model-type", targets(), f"{', '.join(targets())}; auto (default) takes a stock class that computes the same "
       "function, or our own", default=None, metavar="TYPE")  # fmt: skip
    hf("--fold", bool, "fold the pool into each layer's own experts", default=None)
    hf("--max-shard-size", str, "of one weight file, such as 5GB (default) or 500MiB", metavar="SIZE")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""The conversion tool's command line: from any family of checkpoints to any, tensor by tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from tqdm import tqdm

from megatron_samoe.cli.program import program
from megatron_samoe.config.option import flag
from megatron_samoe.convert.hf.export import refuse_other_tensors
from megatron_samoe.convert.hf.target import targets
from megatron_samoe.convert.opener import open_folder
from megatron_samoe.convert.target import DTYPES, Conversion, plan_gguf, plan_hf, plan_native, plan_torch_dist
from megatron_samoe.dist_checkpointing.opened import Opened
from megatron_samoe.errors import ConfigError, nearest

#: What a model can become: GGUF is written only.
TargetKind = Literal["native", "torch_dist", "hf", "gguf"]
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


#: What wrote Megatron-LM's per-rank files in earlier versions, and their users' way on.
_PER_RANK = {
    name: "per-rank files are written by Megatron-LM itself: convert --to torch_dist, and run its pretrain_gpt.py in the layout "
    "you want, with --load, --ckpt-convert-format torch and --ckpt-convert-save"
    for name in (
        "--to megatron",
        *(
            f"--target-{axis}-parallel-size"
            for axis in ("tensor", "pipeline", "expert", "expert-tensor", "virtual-pipeline")
        ),
        "--transformer-impl",
        "--expert-format",
    )
}


@dataclass(frozen=True, kw_only=True)
class ToHuggingFace:
    """Each means nothing for another target."""

    hf_model_type: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="TYPE",
            help=f"{', '.join(targets())}; auto (default) takes a stock class that computes the same function, or our own",
        ),
    ] = None
    fold: bool = False
    """fold the pool into each layer's own experts"""
    max_shard_size: Annotated[str | None, tyro.conf.arg(metavar="SIZE")] = None
    """of one weight file, such as 5GB (default) or 500MiB"""

    def options(self) -> dict[str, Any]:
        """Returns what is asked of `plan_export`."""
        kind, size = self.hf_model_type or "auto", _bytes(self.max_shard_size or "5GB")
        if kind not in targets():
            raise ConfigError("--hf-model-type", kind, f"one of {', '.join(targets())}.{nearest(kind, targets())}")
        return {"wanted": kind, "fold": self.fold, "max_shard_bytes": size}


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Converts a model between this program's checkpoints, Megatron-LM's (torch_dist, or per-rank files) and Hugging Face folders.

    Both formats are found out: the source's from its files; the target is Hugging Face's if one of its options is given, and else
    a checkpoint of this program, unless that is what the source is. --to gguf writes llama.cpp's file. Weights only: optimizer
    state stays behind.
    """

    FORMER: ClassVar[Mapping[str, str]] = _PER_RANK

    load_dir: str
    """folder of a run, of checkpoints, of one iteration, or of Hugging Face"""
    save_dir: str
    """where to write; nothing that is there is overwritten"""
    source: Annotated[str, tyro.conf.arg(name="from", metavar="FORMAT")] = "auto"
    """format of the source: native, megatron (per-rank files), torch_dist, hf, or auto"""
    target: Annotated[Literal["auto"] | TargetKind, tyro.conf.arg(name="to")] = "auto"
    """format of the target"""
    ckpt_step: int | None = None
    """iteration to convert; the newest if not given"""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """precision to write; as stored if not given"""
    vocab_size: int | None = None
    """tokens that exist, where Megatron's files do not say"""
    no_tokenizer: bool = False
    """convert without the tokenizer"""
    dry_run: bool = False
    """print the plan and write nothing"""
    release: bool = False
    """write torch_dist as Megatron's release rather than an iteration"""
    to_hugging_face: ToHuggingFace

    def run(self) -> None:
        source = open_folder(self.load_dir, self.ckpt_step, wanted=self.source, vocab_size=self.vocab_size)
        refuse_other_tensors(source)
        conversion = self._plan(source)
        lines = [
            f"From {source.described} in {source.directory}.",
            *source.notes,
            f"To {conversion.described}.",
            *conversion.lines,
        ]
        print("\n".join(lines))
        if self.dry_run:
            print("\n".join([*conversion.listing(), "Nothing is written (--dry-run)."]))
            return
        with tqdm(total=conversion.num_bytes, unit="B", unit_scale=True, desc="convert", mininterval=0.5) as bar:
            written = conversion.write(bar.update)
        print(f"Written to {written}.{conversion.hint}")

    def _plan(self, source: Opened) -> Conversion:
        target = self._target(source)
        save_dir, dtype, carries_tokenizer = Path(self.save_dir), DTYPES.get(self.dtype), not self.no_tokenizer
        if target == "native":
            return plan_native(source, save_dir, dtype, carries_tokenizer)
        if target == "gguf":
            return plan_gguf(source, save_dir, dtype, carries_tokenizer)
        if target == "torch_dist":
            return plan_torch_dist(source, save_dir, dtype, self.release)
        return plan_hf(source, save_dir, dtype, carries_tokenizer, **self.to_hugging_face.options())

    def _target(self, source: Opened) -> TargetKind:
        """Returns the target's family.

        Raises:
            ConfigError: it is not known, is the source's, or an option is for another.
        """
        given = {name: value for name, value in asdict(self.to_hugging_face).items() if value not in (None, False)}
        target: Any = self.target
        if target == "auto":
            target = "hf" if given else "torch_dist" if self.release else "native"
            if target == source.kind == "native":
                allowed = "this program's checkpoints load in any layout as they are; say torch_dist or hf"
                raise ConfigError("--to", "auto", allowed)
        if target == source.kind == "native":
            raise ConfigError("--to", target, "the source is one already, and loads in any layout as it is")
        if given and target != "hf":
            name, value = next(iter(given.items()))
            raise ConfigError(flag(name), value, f"is for --to hf, not {target}")
        if self.release and target != "torch_dist":
            raise ConfigError("--release", True, f"is for --to torch_dist, not {target}")
        if self.no_tokenizer and target == "torch_dist":
            raise ConfigError("--no-tokenizer", True, "is for --to hf, gguf and native: Megatron's files hold none")
        found: TargetKind = target
        return found


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


main = program(Convert)

if __name__ == "__main__":
    sys.exit(main())

"""Begins a project: a folder with a configuration that explains itself, its schema, and a script for Slurm."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from megatron_samoe.cli.program import program
from megatron_samoe.config.schema import explained_yaml, json_schema
from megatron_samoe.datasets.bin_readers import is_remote
from megatron_samoe.datasets.preprocess.inputs import find_inputs
from megatron_samoe.datasets.preprocess.options import PreprocessOptions
from megatron_samoe.errors import ConfigError, DataError, nearest
from megatron_samoe.installation import checkout
from megatron_samoe.parsing import parse_yaml

#: What the files of a project are made from.
TEMPLATES = Path(__file__).with_name("init_data")
HEAD = "# yaml-language-server: $schema=schema.json\n"
#: Up to how many bytes a text is small, and how many it needs, so that what is held out of it holds samples.
SMALL_BYTES, LEAST_BYTES = 50_000_000, 50_000
CUT = "--document-kb {} "
COMMENT = """# From text to a model that answers. All options: megatron-samoe pretrain --help.
{commands}# On two ranks: torchrun --nproc-per-node 2 -m megatron_samoe pretrain --config config.yaml --micro-batch-size {each}
"""
SLURM_RANKS = 16


def examples() -> dict[str, Path]:
    """Returns the examples by name: configurations of models, and studies."""
    root = checkout()
    # A wheel holds them; an editable installation has the repository's.
    folder = root / "examples" if root is not None else Path(__file__).with_name("examples")
    return {path.stem: path for kind in ("configs", "studies") for path in sorted((folder / kind).glob("*.yaml"))}


def _shown_examples() -> str:
    registered = ("second_", "third_")
    others = ", ".join(name for name in examples() if not name.startswith(registered))
    return f"{others}, or a registered study of docs/results ({', '.join(f'{prefix}*' for prefix in registered)})"


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _is_small(text_bytes: int | None) -> bool:
    return text_bytes is not None and text_bytes < SMALL_BYTES


def _shown(expert_layout: str | None, text_bytes: int | None) -> dict[str, dict[str, Any]]:
    """Returns the options that the configuration shows, by group."""
    shown = parse_yaml(_template("shown.yaml"))
    if _is_small(text_bytes):
        for group, values in parse_yaml(_template("small.yaml")).items():
            shown[group].update(values)
    if text_bytes is not None:
        # No more than what is held out, a twentieth at some four bytes a token, once.
        samples = text_bytes // 20 // 4 // shown["model"]["seq_length"]
        most = max(samples // shown["training"]["global_batch_size"], 1)
        shown["training"]["eval_iters"] = min(shown["training"]["eval_iters"], most)
    if expert_layout is not None:
        shown["moe"]["expert_layout"] = expert_layout
    if expert_layout != "samoe":
        del shown["moe"]["num_expert_banks"]
    if expert_layout == "dense":
        shown["moe"] = {"expert_layout": "dense"}
        del shown["logging"]["moe_per_layer_logging"]
    return shown


def _commands(text: Sequence[str] | None, folder: Path) -> tuple[str, int | None]:
    """Returns the commands from a text to a served model, as the project's folder runs them, and the text's bytes.

    Args:
        text: inputs as `megatron-samoe preprocess` takes them; None for one that is not known yet.

    Raises:
        DataError: a text is missing or too short.
    """
    if text is None:
        return _template("commands.sh").format(text="text.txt", cut=CUT.format(2), vocab_size=8192), None
    try:
        files = find_inputs(PreprocessOptions(input=tuple(text), output_prefix="data"))
    except DataError as error:
        raise DataError(str(error).replace("--input", "--text")) from None
    size = sum(file.num_bytes for file in files)
    if size < LEAST_BYTES:
        raise DataError(
            f"--text {' '.join(text)} has {size:,} bytes. A twentieth of a text is held out, so it needs {LEAST_BYTES:,} "
            "at the very least, and some millions to learn words from."
        )
    words = [path if is_remote(path) or os.path.isabs(path) else os.path.relpath(path, folder) for path in text]
    # 200 documents or more, of which a twentieth is held out; pages rather than chapters, and of many parts.
    cut = CUT.format(min(max(size // 200 >> 10, 1), 16)) if any(file.format == "text" for file in files) else ""
    return _template("commands.sh").format(
        text=shlex.join(words), cut=cut, vocab_size=4096 if _is_small(size) else 8192
    ), size


@dataclass(frozen=True, kw_only=True)
class Init:
    """Begins a project: `megatron-samoe init NAME` makes a folder with a configuration that explains itself, a JSON schema by
    which editors check and complete it, and a script for Slurm.
    """

    name: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NAME")]
    """folder to make"""
    text: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="FILE [FILE ...]")] = None
    """text to train on: files or folders, in any form that megatron-samoe preprocess reads; size of model and commands are
    made for it"""
    expert_layout: Literal["moe", "samoe", "dense"] | None = None
    """kind of model that the configuration is for; moe if not given"""
    example: Annotated[
        str | None, tyro.conf.arg(metavar="EXAMPLE", help=f"copy an example instead: {_shown_examples()}")
    ] = None

    def run(self) -> None:
        folder = self.name
        if folder.exists():
            raise ConfigError("NAME", str(folder), "is there already; give another")
        if self.example is not None and self.expert_layout is not None:
            raise ConfigError("--expert-layout", self.expert_layout, "is what the example says; leave out --example")
        if self.example is not None and self.text is not None:
            raise ConfigError("--text", " ".join(self.text), "has no meaning with --example")
        commands = ""
        if self.example is None:
            commands, text_bytes = _commands(self.text, folder)
            shown = _shown(self.expert_layout, text_bytes)
            batch, micro_batch = (shown["training"][f"{kind}_batch_size"] for kind in ("global", "micro"))
            listed = "".join(f"#   {line}\n" for line in commands.splitlines())
            comment = COMMENT.format(commands=listed, each=micro_batch // 2)
            files = {
                "config.yaml": HEAD + comment + explained_yaml(shown),
                "pretrain.slurm": _template("pretrain.slurm").format(name=folder.name, each=batch // SLURM_RANKS),
            }
        else:
            files = _example(self.example)
        if "config.yaml" in files:
            files["schema.json"] = json.dumps(json_schema(), indent=1) + "\n"
        try:
            (folder / "data").mkdir(parents=True)
            for name, text in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"{folder} cannot be made: {error.strerror or error}") from None
        first, *others = files
        print(f"{folder}: {first} (begin there), {', '.join(others)}")
        if self.text:
            print(f"\nFrom the text to a model that answers:\n\ncd {shlex.quote(str(folder))}\n{commands}", end="")


def _example(name: str) -> dict[str, str]:
    """Returns the files of an example by their names in the project; a study comes with the configuration that it varies."""
    known = examples()
    if name not in known:
        raise ConfigError("--example", name, f"is not known.{nearest(name, known)} There are {', '.join(known)}")
    text = known[name].read_text(encoding="utf-8")
    if known[name].parent.name != "studies":
        return {"config.yaml": HEAD + text}
    (line,) = re.findall(r"^config: .*$", text, re.MULTILINE)
    varied = (known[name].parent / line.removeprefix("config: ")).resolve()
    if not varied.exists():  # the package's own, which a study names by its path in the repository
        varied = Path(__file__).resolve().parents[1] / line.rpartition("megatron_samoe/")[2]
    return {
        f"studies/{name}.yaml": text.replace(line, f"config: ../configs/{varied.name}"),
        f"configs/{varied.name}": varied.read_text(encoding="utf-8"),
    }


main = program(Init)

if __name__ == "__main__":
    sys.exit(main())

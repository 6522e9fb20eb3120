"""One command for all programs: `megatron-samoe COMMAND ...`, `python -m megatron_samoe COMMAND ...`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Mapping

from megatron_samoe import __version__, start
from megatron_samoe.errors import nearest

#: Command to (module, what it does); a module without a dot is of this package.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "train four small models on two novels, and compare them: the first thing to try"),
    "init": ("init", "begin a project: a configuration that explains itself, its schema, a script for Slurm"),
    "doctor": ("doctor", "say what this installation can do here, and what is missing"),
    "completion": ("completion", "print a script that completes this command in a shell"),
    "train-tokenizer": ("train_tokenizer", "train a tokenizer on text"),
    "preprocess": ("preprocess", "make indexed datasets from text"),
    "merge": ("merge", "join datasets into one"),
    "inspect-dataset": ("inspect_dataset", "look at a dataset, check or repair it"),
    "pretrain": ("pretrain", "train a model; under torchrun, on many ranks"),
    "plan": ("plan", "rank the parallel layouts of a model on a cluster"),
    "study": ("study", "train several models with several seeds, and compare them"),
    "rendezvous-store": ("rendezvous_store", "keep torchrun's store outside the job's hosts"),
    "generate": ("generate", "generate text"),
    "serve": ("serve", "serve a model over HTTP"),
    "evaluate": ("evaluate", "evaluate zero-shot tasks and perplexity"),
    "convert": ("convert", "convert checkpoints from and to Hugging Face and Megatron-LM"),
    "edit": ("edit", "make a model of another family from a trained one"),
    "compress": ("compress", "make a trained MoE smaller: its layers come to share experts, fitted on text"),
    "inspect": ("inspect_checkpoint", "look into a checkpoint, compare two, verify one"),
    "diagnose": ("diagnose", "show what a checkpoint's experts are taught: gradients of banks, layers against layers"),
    "report": ("report", "write an HTML report about runs"),
    "benchmark": ("megatron_samoe.gpu_check.command", "measure speed against limits, plain torch and other programs"),
}
#: What --help says above a command, of it and those that follow.
HEADS = {
    "quickstart": "Begin",
    "train-tokenizer": "Prepare data",
    "pretrain": "Train",
    "generate": "Use a model",
    "convert": "Change a model",
    "inspect": "Look closer",
}

#: Commands that say at a terminal that they have begun, before torch is loaded.
LOADING = ("pretrain", "generate", "serve", "evaluate")


def module_of(command: str) -> str:
    """Returns the full name of a command's module."""
    module = COMMANDS[command][0]
    return module if "." in module else f"megatron_samoe.cli.{module}"


def usage(prog: str, commands: Mapping[str, str], text: str = "", heads: Mapping[str, str] | None = None) -> str:
    """Returns what --help prints of several commands, given what each does, and lines above some of them."""
    width, above_of = max(map(len, commands)), {name: f"\n{head}:\n" for name, head in (heads or {}).items()}
    lines = "\n".join(f"{above_of.get(name, '')}  {name:{width}}  {what}" for name, what in commands.items()).lstrip(
        "\n"
    )
    above = f"{text.strip()}\n\n" if text else ""
    return f"usage: {prog} COMMAND ...\n\n{above}{lines}\n\n{prog} COMMAND --help describes each."


def _help() -> str:
    return usage("megatron-samoe", {name: what for name, (_, what) in COMMANDS.items()}, heads=HEADS)


def main() -> int:
    """Runs a command and returns its exit status."""
    start.prepare()
    name, rest = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if {"-h", "--help"} & {name, *rest} and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `head` closes the pipe when it has enough
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        near = nearest(name, COMMANDS) or " megatron-samoe --help lists them."
        print(f"error: {name} is not a command.{near}", file=sys.stderr)
        return 2
    # Parsers name the program by this, and so do their messages.
    sys.argv = [f"megatron-samoe {name}", *rest]
    if name == "pretrain" and {"-h", "--help"} & set(rest):
        # The configuration needs no torch, which takes seconds to load.
        importlib.import_module("megatron_samoe.config.cli").parse_pretrain_args(["--help"])
    if name in LOADING and sys.stderr.isatty() and "RANK" not in os.environ:
        print(f"megatron-samoe {name}: loading torch, which takes seconds", file=sys.stderr, flush=True)
    with start.importing():
        program = importlib.import_module(module_of(name))
    status: int = program.main()
    return status


if __name__ == "__main__":
    sys.exit(main())

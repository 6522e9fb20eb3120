"""The C++ compiler of the build: how it is found and run, and what it accepts."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

LAUNCHERS = ("ccache", "sccache")


class BuildError(Exception):
    """Why the extension, or a part of it, cannot be built, as a sentence for the user."""


class SettingError(BuildError):
    """A setting whose value has no meaning: refused, whatever could be built without it."""


def find_compiler() -> list[str]:
    """Returns the C++ compiler's command: $CXX (which may carry ccache), else the first of g++, c++, clang++."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"CXX = {' '.join(asked)!r} is not an executable; name a C++ compiler or leave CXX unset.")
        return asked
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("There is no C++ compiler. Install one with `apt-get install g++` and install the package again.")


def target_machine(compiler: list[str]) -> str:
    """Returns the processor that a compiler makes programs for, such as x86_64 or aarch64."""
    return run([*compiler, "-dumpmachine"]).split("-")[0]


def split_launcher(compiler: list[str]) -> tuple[list[str], list[str]]:
    """Returns the cache in front of a compiler's command, if there is one, and the rest."""
    cut = 1 if len(compiler) > 1 and Path(compiler[0]).name in LAUNCHERS else 0
    return compiler[:cut], compiler[cut:]


def run(command: list[str]) -> str:
    """Runs a compiler and returns its output; a failure becomes a BuildError that shows the first errors."""
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        name = " ".join(command[:2])
        raise BuildError(
            f"`{name} ...` failed with status {result.returncode}:\n    " + "\n    ".join(errors_of(output))
        )
    return output


def errors_of(output: str) -> list[str]:
    """Returns the first lines of a compiler's output that speak of an error, or simply the first."""
    lines = [line for line in output.splitlines() if "error" in line.lower() or "fatal" in line.lower()]
    return (lines or output.splitlines())[:8]


def accepts(compiler: list[str], flags: list[str], code: str = "int main() { return 0; }") -> bool:
    """Returns whether the compiler builds a small program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(code)
        command = [*compiler, *flags, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True).returncode == 0

"""The build of the compiled extension: finds a compiler, compiles what changed, links, and prints a report.

setuptools knows one set of flags per extension; here the files of kernels/cpu/simd are compiled once for each
instruction set, and only the bindings see torch's headers.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
MODES = ("auto", "cpu", "cuda", "none")
X86_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
COMMON_FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]


class BuildError(Exception):
    """Why the extension cannot be built, as a sentence for the user."""


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


def import_torch():
    """Returns torch; the extension is compiled against it."""
    try:
        import torch
    except ImportError:
        raise BuildError(
            "torch cannot be imported by the build. Install torch first, then build without isolation: "
            "`pip install --no-build-isolation -e .`."
        ) from None
    return torch


def run(command: list[str]) -> str:
    """Runs a compiler and returns its output; a failure becomes a BuildError that shows the first errors."""
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
        raise BuildError(
            f"`{' '.join(command[:2])} ...` failed with status {result.returncode}:\n    " + "\n    ".join(lines[:8])
        )
    return output


def accepts(compiler: list[str], flags: list[str], code: str = "int main() { return 0; }") -> bool:
    """Returns whether the compiler builds a small program with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(code)
        command = [*compiler, *flags, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True).returncode == 0


class Toolchain:
    """What the compiler can do, and the flags that follow.

    compiler: the command. openmp, instruction_sets: what was found. torch: the module that is built against.
    """

    def __init__(self) -> None:
        self.compiler = find_compiler()
        if not accepts(self.compiler, []):
            raise BuildError(
                f"`{' '.join(self.compiler)}` cannot build an empty program. "
                "Install a working compiler with `apt-get install g++` and install the package again."
            )
        self.torch = import_torch()
        openmp_program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
        self.openmp = ["-fopenmp"] if accepts(self.compiler, ["-fopenmp"], openmp_program) else []
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        self.instruction_sets = {"portable": []}
        if is_x86 and all(accepts(self.compiler, flags) for flags in X86_SETS.values()):
            self.instruction_sets.update(X86_SETS)
        self.version = run([*self.compiler, "--version"]).splitlines()[0]

    def record(self) -> dict[str, object]:
        """Returns what the library says about its own build."""
        return {
            "torch": self.torch.__version__,
            "compiler": self.version,
            "openmp": bool(self.openmp),
            "instruction_sets": list(self.instruction_sets),
            "cuda": None,
        }

    def torch_flags(self) -> list[str]:
        include = Path(self.torch.__file__).parent / "include"
        # The headers ask for the standard that torch itself was built with.
        standard = "c++20" if "C++ Version: 202002" in self.torch.__config__.show() else "c++17"
        abi = int(self.torch.compiled_with_cxx11_abi())
        return [
            f"-std={standard}",
            f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
            "-Wno-unused-parameter",
            "-isystem",
            str(include),
            "-isystem",
            str(include / "torch/csrc/api/include"),
        ]

    def jobs(self, source: str) -> list[tuple[str, list[str]]]:
        """Returns (suffix of the object's name, flags) for each time that a source is compiled."""
        parts = Path(source).parts
        base = [*COMMON_FLAGS, *self.openmp]
        if not self.openmp:
            base.append("-Wno-unknown-pragmas")
        if "simd" in parts:
            return [
                (f".{name}", [*base, "-std=c++17", f"-DSAMOE_ISA={name}", *flags])
                for name, flags in self.instruction_sets.items()
            ]
        if "avx512" in self.instruction_sets:
            base.append("-DSAMOE_WITH_X86_SETS")
        if "bindings" in parts:
            return [("", [*base, *self.torch_flags()])]
        if Path(source).name == "build_record.cpp":
            text = json.dumps(json.dumps(self.record()))  # a C string literal of the JSON text
            return [("", [*base, "-std=c++17", f"-DSAMOE_BUILD_RECORD={text}"])]
        return [("", [*base, "-std=c++17"])]

    def link_flags(self) -> list[str]:
        libraries = Path(self.torch.__file__).parent / "lib"
        return ["-shared", *self.openmp, "-L", str(libraries), "-ltorch_cpu", "-lc10", "-ldl", "-Wl,--no-undefined"]


def is_fresh(target: Path, stamp: Path, command: list[str], dependencies: Path | None) -> bool:
    """Returns whether target was made by this very command after everything that it was made from."""
    if not target.exists() or not stamp.exists() or stamp.read_text() != "\n".join(command):
        return False
    if dependencies is None or not dependencies.exists():
        return False
    names = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime
    return all(Path(name).exists() and Path(name).stat().st_mtime <= made for name in names)


def compile_one(toolchain: Toolchain, source: str, suffix: str, flags: list[str], folder: Path) -> tuple[Path, bool]:
    """Compiles one source unless its object is fresh. Returns the object and whether it was compiled."""
    target = folder / (source.replace(os.sep, "__") + suffix + ".o")
    dependencies, stamp = target.with_suffix(".d"), target.with_suffix(".cmd")
    command = [*toolchain.compiler, *flags, "-MMD", "-MF", str(dependencies), "-c", source, "-o", str(target)]
    if is_fresh(target, stamp, command, dependencies):
        return target, False
    stamp.unlink(missing_ok=True)
    run(command)
    stamp.write_text("\n".join(command))
    return target, True


def build_library(sources: list[str], folder: Path, library: Path) -> dict[str, object]:
    """Compiles and links the extension. Returns the report's entries; errors: BuildError."""
    started = time.monotonic()
    toolchain = Toolchain()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(source, suffix, flags) for source in sources for suffix, flags in toolchain.jobs(source)]
    jobs.sort(key=lambda job: "bindings" not in Path(job[0]).parts)  # the slowest first
    num_workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(num_workers) as pool:
        results = list(pool.map(lambda job: compile_one(toolchain, *job, folder), jobs))
    library.parent.mkdir(parents=True, exist_ok=True)
    # A running process may have the old library mapped: replace the file, never write into it.
    fresh = library.with_name(library.name + ".new")
    run([*toolchain.compiler, *(str(target) for target, _ in results), *toolchain.link_flags(), "-o", str(fresh)])
    fresh.replace(library)
    return {
        **toolchain.record(),
        "files": f"{sum(compiled for _, compiled in results)} of {len(results)} compiled, the others were fresh",
        "seconds": round(time.monotonic() - started, 1),
        "library": str(library),
    }


class BuildExtension(build_ext):
    """setuptools' command for `megatron_samoe._C`."""

    def get_ext_filename(self, fullname: str) -> str:
        """Returns the library's path, without a Python version: torch loads it, not Python's import."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        mode = os.environ.get("MEGATRON_SAMOE_BUILD", "auto")
        if mode not in MODES:
            raise SystemExit(f"MEGATRON_SAMOE_BUILD = {mode!r}: one of {', '.join(MODES)}")
        if mode == "none":
            print("megatron_samoe: MEGATRON_SAMOE_BUILD=none: the compiled extension is not built.")
            return
        try:
            if mode == "cuda":
                raise BuildError("Nothing launches the CUDA kernels yet; use MEGATRON_SAMOE_BUILD=cpu.")
            os.chdir(ROOT)
            library = Path(self.get_ext_fullpath(ext.name)).resolve()
            report = build_library(ext.sources, Path(self.build_temp).resolve() / "objects", library)
        except BuildError as error:
            if mode != "auto":
                raise SystemExit(f"megatron_samoe: the compiled extension could not be built. {error}") from None
            message = f"megatron_samoe: the compiled extension is NOT built; the package works, slower.\n  {error}"
            print(message, file=sys.stderr)
            # A library of older sources must not pass for this one.
            for stale in (Path(self.get_ext_fullpath(ext.name)), ROOT / "megatron_samoe" / "_C.so"):
                stale.unlink(missing_ok=True)
            return
        print("megatron_samoe: the compiled extension is built.")
        for name, value in report.items():
            print(f"  {name}: {value}")

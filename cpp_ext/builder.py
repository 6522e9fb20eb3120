"""The build of the compiled extension: finds a compiler, compiles what changed, links, and prints a report.

setuptools knows one set of flags per extension; here the files of kernels/cpu/simd are compiled once for each
instruction set, only the bindings see torch's headers, and the CUDA files (*.cu, *_cuda.cpp) are there with a CUDA torch
and nvcc alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compiler import BuildError, SettingError, accepts, find_compiler, run, target_machine
from cuda_toolkit import CudaToolkit
from setuptools import Extension
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent.parent
#: pip gives every build a folder of its own; this one stays.
OBJECTS = ROOT / "build" / "objects"
MODES = ("auto", "cpu", "cuda", "none")
X86_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
#: The library takes every torch from this one on: the bindings use nothing but the stable ABI, as this one has it.
OLDEST_TORCH = (2, 11)
COMMON_FLAGS = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]


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


def digest_of_sources() -> str:
    """Returns what tells these sources from others."""
    files = sorted(path for path in (ROOT / "cpp_ext").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


class Toolchain:
    """What the compilers can do, and the flags that follow.

    mode: auto takes CUDA where it can be built, cuda insists, cpu leaves it out. compiler: the command. openmp,
    instruction_sets, cuda: what was found. torch: the module that is built against. notes: what is missing, and the way
    to get it, as sentences. Errors: BuildError.
    """

    def __init__(self, mode: str) -> None:
        self.notes: list[str] = []
        self.compiler = find_compiler()
        if not accepts(self.compiler, []):
            raise BuildError(
                f"`{' '.join(self.compiler)}` cannot build an empty program. "
                "Install a working compiler with `apt-get install g++` and install the package again."
            )
        self.torch = import_torch()
        openmp_program = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
        self.openmp = ["-fopenmp"] if accepts(self.compiler, ["-fopenmp"], openmp_program) else []
        if not self.openmp:
            self.notes.append(
                "The compiler has no OpenMP, so the kernels use one thread; g++ has it, and clang with libomp-dev."
            )
        self.instruction_sets: dict[str, list[str]] = {"portable": []}
        self.machine = target_machine(self.compiler)
        if self.machine == "x86_64":
            if all(accepts(self.compiler, flags) for flags in X86_SETS.values()):
                self.instruction_sets.update(X86_SETS)
            else:
                self.notes.append(
                    "The compiler knows no AVX-512, so the kernels are built for every x86 CPU and are slower; "
                    "g++ 12 or newer knows it."
                )
        self.version = run([*self.compiler, "--version"]).splitlines()[0]
        self.cuda = self._find_cuda(mode)

    def _find_cuda(self, mode: str) -> CudaToolkit | None:
        if mode == "cpu":
            return None
        if self.torch.version.cuda is None:
            if mode == "cuda":
                raise BuildError(
                    f"torch {self.torch.__version__} was built without CUDA. Install a CUDA torch, or use "
                    "MEGATRON_SAMOE_BUILD=cpu."
                )
            return None
        try:
            return CudaToolkit(self.torch, self.compiler)
        except SettingError:
            raise
        except BuildError as error:
            if mode == "cuda":
                raise
            self.leave_cuda_out(error)
            return None

    def leave_cuda_out(self, why: BuildError) -> None:
        """Goes on without CUDA, and says so."""
        self.cuda = None
        self.notes.append(f"The CUDA kernels are left out. {why}")

    def record(self) -> dict[str, object]:
        """Returns what the library says about its own build."""
        return {
            "sources": digest_of_sources(),
            "schemas": hashlib.sha256((ROOT / "megatron_samoe" / "ops" / "schemas.txt").read_bytes()).hexdigest(),
            "torch": self.torch.__version__,
            "oldest_torch": ".".join(map(str, OLDEST_TORCH)),
            "compiler": self.version,
            "machine": self.machine,
            "openmp": bool(self.openmp),
            "instruction_sets": list(self.instruction_sets),
            "cuda": self.cuda.version if self.cuda else None,
            "cuda_archs": self.cuda.archs if self.cuda else [],
        }

    def versions(self) -> list[str]:
        """Returns what objects depend on besides commands and the project's files."""
        return [self.version, self.torch.__version__, str(self.cuda and self.cuda.version)]

    def takes(self, source: str) -> bool:
        """Returns whether a source belongs to this build."""
        return self.cuda is not None or not source.endswith((".cu", "_cuda.cpp"))

    def torch_flags(self) -> list[str]:
        include = Path(self.torch.__file__).parent / "include"
        major, minor = OLDEST_TORCH
        return [
            "-std=c++17",
            f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}",
            "-Wno-unused-parameter",
            "-isystem",
            str(include),
        ]

    def jobs(self, source: str) -> list[tuple[str, list[str]]]:
        """Returns (suffix of the object's name, compiler and flags) for each time that a source is compiled."""
        parts = Path(source).parts
        if source.endswith(".cu"):
            assert self.cuda is not None
            return [("", [*self.cuda.nvcc, *self.cuda.flags()])]
        base = [*self.compiler, *COMMON_FLAGS, *self.openmp]
        if not self.openmp:
            base.append("-Wno-unknown-pragmas")
        if "simd" in parts:
            return [
                (f".{name}", [*base, "-std=c++17", f"-DSAMOE_ISA={name}", *flags])
                for name, flags in self.instruction_sets.items()
            ]
        if "avx512" in self.instruction_sets:
            base.append("-DSAMOE_WITH_X86_SETS")
        if self.cuda is not None and parts[1] in ("bindings", "comm"):
            base += self.cuda.includes
        if "bindings" in parts:
            return [("", [*base, *self.torch_flags()])]
        if Path(source).name == "build_record.cpp":
            text = json.dumps(json.dumps(self.record()))  # a C string literal of the JSON text
            return [("", [*base, "-std=c++17", f"-DSAMOE_BUILD_RECORD={text}"])]
        return [("", [*base, "-std=c++17"])]

    def link_flags(self, objects: list[Path]) -> list[str]:
        """Returns the linker's flags: torch's stable ABI, and CUDA's runtime for the kernels."""
        libraries = Path(self.torch.__file__).parent / "lib"
        if self.machine != platform.machine():
            libraries = self._stub_of_torch(objects)
        runtime = [str(self.cuda.runtime)] if self.cuda else []
        torch_libraries = ["-L", str(libraries), "-ltorch_cpu"]
        return ["-shared", *self.openmp, *torch_libraries, *runtime, "-ldl", "-Wl,--no-undefined"]

    def _stub_of_torch(self, objects: list[Path]) -> Path:
        """Returns a folder with a libtorch_cpu to link with in place of another machine's torch: the functions of the ABI
        that the objects name, empty."""
        names = {n for path in objects for n in re.findall(rb"\0((?:aoti_)?torch_\w+)(?=\0)", path.read_bytes())}
        folder = objects[0].parent / "torch_stub"
        folder.mkdir(exist_ok=True)
        source, library = folder / "stub.c", folder / "libtorch_cpu.so"
        source.write_text("".join(f"void {name.decode()}(void) {{}}\n" for name in sorted(names)))
        run([*self.compiler, "-shared", "-x", "c", str(source), f"-Wl,-soname,{library.name}", "-o", str(library)])
        return folder


@functools.cache
def digest_of(path: str) -> str:
    """Returns what tells a file's content from others; empty for a file that is not there."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else ""


def digest_of_object(made_by: list[str], dependencies: Path) -> str:
    """Returns what tells an object from others: how it is made, and the contents of the files that the compiler says it
    read, the system's and torch's left out."""
    names = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return hashlib.sha256(json.dumps([made_by, [(name, digest_of(name)) for name in names]]).encode()).hexdigest()


def compile_one(source: str, suffix: str, compiler: list[str], versions: list[str], folder: Path) -> tuple[Path, bool]:
    """Compiles one source, unless its object was made by this very command and these versions of the same contents.

    Contents, not times, so that what lies in the checkout serves every installation from it. Returns the object and
    whether it was compiled.
    """
    target = folder / (source.replace(os.sep, "__") + suffix + ".o")
    dependencies, stamp = target.with_suffix(".d"), target.with_suffix(".sha256")
    made_by = [*compiler, *versions]
    if all(path.exists() for path in (target, dependencies, stamp)):
        if stamp.read_text().partition("\n")[0] == digest_of_object(made_by, dependencies):
            return target, False
    # First under names of this process, since another may build here, too.
    new = [path.with_suffix(f".{os.getpid()}{path.suffix}") for path in (target, dependencies)]
    run([*compiler, "-MMD", "-MF", str(new[1]), "-c", source, "-o", str(new[0])])
    stamp.unlink(missing_ok=True)
    new[0].replace(target)
    new[1].replace(dependencies)
    # What made it stands below, for whoever looks.
    stamp.write_text("\n".join([digest_of_object(made_by, dependencies), *made_by]))
    return target, True


def compile_and_link(toolchain: Toolchain, sources: list[str], folder: Path, library: Path) -> str:
    """Builds the library. Returns how many files were compiled; errors: BuildError."""
    jobs = [(source, *job) for source in sources if toolchain.takes(source) for job in toolchain.jobs(source)]
    jobs.sort(key=lambda job: "bindings" not in Path(job[0]).parts)  # the slowest first
    num_workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    results = []
    with ThreadPoolExecutor(num_workers) as pool:
        for result in pool.map(lambda job: compile_one(*job, toolchain.versions(), folder), jobs):
            results.append(result)
            if sys.stderr.isatty():
                end = "\n" if len(results) == len(jobs) else ""
                print(f"\r{len(results)} of {len(jobs)} objects are there", end=end, file=sys.stderr, flush=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    # A running process may have the old library mapped: replace the file, never write into it.
    fresh = library.with_name(library.name + ".new")
    objects = [target for target, _ in results]
    run([*toolchain.compiler, *map(str, objects), *toolchain.link_flags(objects), "-o", str(fresh)])
    fresh.replace(library)
    return f"{sum(compiled for _, compiled in results)} of {len(results)} compiled, the others were there"


def build_library(sources: list[str], folder: Path, library: Path, mode: str) -> dict[str, object]:
    """Compiles and links the extension. Returns the report's entries; errors: BuildError."""
    started = time.monotonic()
    toolchain = Toolchain(mode)
    folder = folder / toolchain.machine
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = compile_and_link(toolchain, sources, folder, library)
    except BuildError as error:
        if mode != "auto" or toolchain.cuda is None:
            raise
        toolchain.leave_cuda_out(error)
        files = compile_and_link(toolchain, sources, folder, library)
    return {
        **toolchain.record(),
        "files": files,
        "seconds": round(time.monotonic() - started, 1),
        "library": str(library),
        "notes": toolchain.notes,
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
        os.chdir(ROOT)
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            report = build_library(ext.sources, OBJECTS, library, mode)
        except BuildError as error:
            if mode != "auto" or isinstance(error, SettingError):
                raise SystemExit(f"megatron_samoe: the compiled extension could not be built. {error}") from None
            there = [path for path in (library, ROOT / "megatron_samoe" / "_C.so") if path.exists()]
            # A build that fails must not cost the library of an earlier one.
            if there and all(digest_of_sources().encode() in path.read_bytes() for path in there):
                print(f"megatron_samoe: the compiled extension stays as it was built.\n  {error}", file=sys.stderr)
                return
            message = f"megatron_samoe: the compiled extension is NOT built; the package works, slower.\n  {error}"
            print(message, file=sys.stderr)
            for stale in there:  # a library of older sources must not pass for this one
                stale.unlink()
            return
        print("megatron_samoe: the compiled extension is built.")
        for note in report.pop("notes"):
            print(f"  note: {note}", file=sys.stderr)
        for name, value in report.items():
            print(f"  {name}: {value}")

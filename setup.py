"""Builds the package, and with it the compiled extension where a C++ compiler is at hand.

MEGATRON_SAMOE_BUILD=auto (default) builds what the machine allows, with the CUDA kernels where torch is a CUDA build and
nvcc is at hand, and installs the pure-Python package otherwise; cpu and cuda insist and fail where they cannot be built;
none builds nothing.

`pip install .` brings a torch of its own to build with; `pip install --no-build-isolation -e .` and `python setup.py build_ext
--inplace` take the environment's. `make wheels` makes wheels.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cpp_ext"))  # build back ends do not put the project on the path

import builder  # noqa: E402


class Wheel(bdist_wheel):
    """A wheel for every Python: torch loads the extension, and it uses torch's stable ABI alone."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Package(build_py):
    """The package with the examples, which `megatron-samoe init --example` copies."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in sorted((ROOT / "examples").glob("*/*.yaml")):
                copy = Path(self.build_lib) / "megatron_samoe" / "cli" / path.relative_to(ROOT)
                self.mkpath(str(copy.parent))
                self.copy_file(str(path), str(copy))


def sources() -> list[str]:
    found = sorted(path for path in (ROOT / "cpp_ext").rglob("*") if path.suffix in (".cpp", ".cu"))
    return [str(path.relative_to(ROOT)) for path in found if "testing" not in path.parts]


def refuse_build_without_torch() -> None:
    """Ends a build that sees no torch: what it installed would be slower than it could be, and nobody would know."""
    building = {"bdist_wheel", "editable_wheel", "build_ext", "install", "develop"} & set(sys.argv)
    if not building or os.environ.get("MEGATRON_SAMOE_BUILD") == "none" or importlib.util.find_spec("torch"):
        return
    sys.exit(
        "error: this build sees no torch, against which the extension is compiled. Leave --no-build-isolation out, so that "
        "pip brings it; or install it first (pip install torch numpy setuptools wheel); or set MEGATRON_SAMOE_BUILD=none for "
        "the pure-Python package, which is slower."
    )


refuse_build_without_torch()
# optional: an extension that could not be built must not stop the installation.
setup(
    ext_modules=[Extension("megatron_samoe._C", sources(), optional=True)],
    cmdclass={"build_ext": builder.BuildExtension, "build_py": Package, "bdist_wheel": Wheel},
)

"""setup.py where a machine lacks something: the package still installs and a sentence names the way out.

The CUDA half has a torch and an nvcc of the tests: the torch has the attributes that the build reads and libraries of one
function; the nvcc compiles with g++.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.pairs import first_by_day

ROOT = Path(__file__).resolve().parents[3]
COMPILER = shutil.which("g++") or ""
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no g++")

TORCH = """
import os, types
__version__ = "2.99.0"
version = types.SimpleNamespace(cuda=os.environ.get("TEST_TORCH_CUDA") or None)
__config__ = types.SimpleNamespace(show=lambda: "C++ Version: 201703")
compiled_with_cxx11_abi = lambda: True
"""
# What nvcc 13.0 says of a host compiler that is newer than it.
TOO_NEW = (
    "crt/host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!"
)
NVCC = Path(__file__).with_name("nvcc.sh").read_text()
KERNEL = """
extern "C" int libcudart();
__global__ void kernel() {}
extern "C" __attribute__((visibility("default"))) int of_nvcc() { return libcudart(); }
"""
BINDING = """
extern "C" int of_nvcc();
extern "C" __attribute__((visibility("default"))) int binding() { return of_nvcc(); }
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def make_library(path: Path) -> None:
    """A library with a function of its own name."""
    name = path.name.split(".")[0]
    source = write(path.parent / f"{name}.cpp", f'extern "C" int {name}() {{ return 0; }}\n')
    subprocess.run([COMPILER, "-shared", f"-Wl,-soname,{path.name}", str(source), "-o", str(path)], check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of installed packages with the torch of the tests and NVIDIA's runtime."""
    folder = tmp_path_factory.mktemp("installed")
    write(folder / "torch" / "__init__.py", TORCH)
    for name in ("torch/lib/libtorch_cpu.so", "torch/lib/libc10.so", "nvidia/cu13/lib/libcudart.so.13"):
        make_library(folder / name)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with one trivial source file."""
    for name in ("setup.py", "pyproject.toml", "cpp_ext/common/build_record.cpp", "megatron_samoe/ops/schemas.txt"):
        write(tmp_path / name, (ROOT / name).read_text())
    for path in (ROOT / "cpp_ext").glob("*.py"):
        shutil.copy(path, tmp_path / "cpp_ext")
    write(tmp_path / "README.md", "x")
    write(tmp_path / "megatron_samoe" / "__init__.py", '__version__ = "0"\n')
    return tmp_path


@pytest.fixture
def cuda_tree(tree: Path, installed: Path) -> Path:
    """With a kernel and its binding, and the torch of the tests and a toolkit beside them."""
    write(tree / "cpp_ext" / "kernels" / "cuda" / "k.cu", KERNEL)
    write(tree / "cpp_ext" / "bindings" / "k_cuda.cpp", BINDING)
    write(tree / "toolkit" / "bin" / "nvcc", NVCC).chmod(0o755)
    (tree / "installed").symlink_to(installed)
    return tree


def build(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Builds a tree, where it has a torch of the tests against that and with its toolkit."""
    own = {
        "PYTHONPATH": str(tree / "installed"),
        "CUDA_HOME": str(tree / "toolkit"),
        "TEST_TORCH_CUDA": "13.0",
        "CXX": COMPILER,
        "TEST_CXX": COMPILER,
    }
    cleared = ("TORCH_CUDA_ARCH_LIST", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN", "MEGATRON_SAMOE_BUILD")
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
    return subprocess.run(
        [sys.executable, "setup.py", *(words or ["build_ext", "--inplace"])],
        cwd=tree,
        env={**inherited, **(own if (tree / "installed").exists() else {}), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def library(tree: Path) -> bytes:
    path = tree / "megatron_samoe" / "_C.so"
    return path.read_bytes() if path.exists() else b""


def test_without_a_compiler(tree):
    (tree / "bin").mkdir()
    result = build(tree, PATH=str(tree / "bin"), CXX="")
    assert result.returncode == 0, result.stderr
    assert "NOT built" in result.stderr and "apt-get install g++" in result.stderr
    assert not library(tree)
    result = build(tree, PATH=str(tree / "bin"), CXX="", MEGATRON_SAMOE_BUILD="cpu")
    assert result.returncode != 0 and "apt-get install g++" in result.stderr
    result = build(tree, CXX="no-such-compiler")
    assert result.returncode == 0 and "CXX = 'no-such-compiler'" in result.stderr


def test_without_torch(tree):
    write(tree / "hidden" / "torch.py", "raise ImportError('hidden')\n")
    result = build(tree, PYTHONPATH=str(tree / "hidden"))
    assert result.returncode == 0, result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr and not library(tree)


def test_a_wheel_is_not_built_without_torch(tree):
    """Without this the extension would be missing and nobody would know."""
    code = (
        "import importlib.util as u, runpy, sys; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a); "
        "sys.argv = ['setup.py', 'bdist_wheel']; runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MEGATRON_SAMOE_BUILD"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "--no-build-isolation" in done.stderr and "Traceback" not in done.stderr


def test_modes(tree):
    result = build(tree, MEGATRON_SAMOE_BUILD="none")
    assert result.returncode == 0 and "is not built" in result.stdout and not library(tree)
    result = build(tree, MEGATRON_SAMOE_BUILD="gpu")
    assert result.returncode != 0 and "auto, cpu, cuda, none" in result.stderr


@needs_compiler
@pytest.mark.night
def test_builds_again_only_what_changed_and_removes_a_stale_library(tree):
    result = build(tree)
    assert result.returncode == 0, result.stderr
    assert "1 of 1 compiled" in result.stdout and library(tree)
    source = tree / "cpp_ext" / "common" / "build_record.cpp"
    source.touch()  # a checkout's times say nothing
    assert "0 of 1 compiled" in build(tree).stdout
    elsewhere = f"build_ext --build-lib {tree}/lib --build-temp {tree}/temp".split()  # as each of pip's builds
    assert "0 of 1 compiled" in build(tree, *elsewhere).stdout and (tree / "lib/megatron_samoe/_C.so").exists()
    assert "1 of 1 compiled" in build(tree, CXX=f"{COMPILER} -DOTHER").stdout
    write(tree / "hidden" / "torch.py", "raise ImportError('hidden')\n")
    result = build(tree, PYTHONPATH=str(tree / "hidden"))
    assert "stays as it was built" in result.stderr and library(tree)
    source.write_text(source.read_text() + "int broken(\n")
    result = build(tree)
    assert result.returncode == 0 and "error" in result.stderr and not library(tree)


@needs_compiler
def test_builds_the_kernels_and_records_them(cuda_tree: Path) -> None:
    result = build(cuda_tree, TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX")
    assert result.returncode == 0, result.stderr
    assert "3 of 3 compiled" in result.stdout and "cuda: 13.0.88" in result.stdout and "note" not in result.stderr
    content = library(cuda_tree)
    assert b"of_nvcc" in content and b"binding" in content and b"libcudart.so.13" in content
    assert rb'"cuda": "13.0.88", "cuda_archs": ["8.0", "9.0a+PTX"]' in content
    (stamp,) = cuda_tree.rglob("*k.cu.sha256")
    words = stamp.read_text().splitlines()[1:]
    assert words[1:3] == ["-ccbin", COMPILER]
    assert {"arch=compute_80,code=sm_80", "arch=compute_90a,code=[sm_90a,compute_90a]"} < set(words)
    assert "0 of 3 compiled" in build(cuda_tree, TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX").stdout
    cpu = build(cuda_tree, MEGATRON_SAMOE_BUILD="cpu", TORCH_CUDA_ARCH_LIST="nonsense")
    assert cpu.returncode == 0 and "1 of 1 compiled" in cpu.stdout and "note" not in cpu.stderr, cpu.stderr
    assert b"of_nvcc" not in library(cuda_tree) and b'"cuda": null' in library(cuda_tree)
    # The default's flags differ, and so does the record.
    result = build(cuda_tree, MEGATRON_SAMOE_BUILD="cuda")
    assert "2 of 3 compiled" in result.stdout and "cuda_archs: ['8.0', '9.0+PTX']" in result.stdout


# What is missing, and what is said of it.
LACKS = {
    "cuda_home": ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME = '/nowhere' has no bin/nvcc"),
    "same_major": ({"TEST_TORCH_CUDA": "12.8"}, "is of CUDA 13.0.88 and torch 2.99.0 was built for CUDA 12.8"),
    "old_enough_host": ({"TEST_NVCC_ERROR": TOO_NEW}, "name it with CUDAHOSTCXX. nvcc says: " + TOO_NEW),
    "working_nvcc": ({"TEST_NVCC_ERROR": "no cicc"}, "cannot compile an empty kernel: no cicc"),
    "good_kernel": ({"TEST_NVCC_BAD_KERNEL": "1"}, "error: bad kernel"),
    "cuda_in_torch": ({"TEST_TORCH_CUDA": ""}, "torch 2.99.0 was built without CUDA"),
}


@needs_compiler
@pytest.mark.parametrize("name", first_by_day(LACKS, 2))
def test_without_what_it_needs(cuda_tree: Path, name: str) -> None:
    environment, said = LACKS[name]
    result = build(cuda_tree, **environment)
    assert result.returncode == 0, result.stderr
    if name == "cuda_in_torch":  # nothing that anybody misses
        assert "note" not in result.stderr
    else:
        assert "note: The CUDA kernels are left out. " in result.stderr and said in result.stderr
    assert b'"cuda": null' in library(cuda_tree) and b"of_nvcc" not in library(cuda_tree)
    result = build(cuda_tree, MEGATRON_SAMOE_BUILD="cuda", **environment)
    assert result.returncode != 0 and said in result.stderr and "Traceback" not in result.stderr


@needs_compiler
def test_without_nvcc(cuda_tree: Path, tmp_path: Path) -> None:
    """Without a toolkit on the machine, and then with NVIDIA's wheels as the toolkit."""
    builder = cuda_tree / "cpp_ext" / "cuda_toolkit.py"
    builder.write_text(builder.read_text().replace('Path("/usr/local/cuda")', 'Path("/nowhere")'))
    path = [part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "nvcc").exists()]
    if shutil.which("g++", path=os.pathsep.join(path)) is None:
        pytest.skip("g++ and nvcc lie in one folder")
    bare = {"CUDA_HOME": "", "PATH": os.pathsep.join(path), "CXX": "g++"}
    result = build(cuda_tree, **bare)
    assert result.returncode == 0, result.stderr
    assert "built for CUDA 13.0, and there is no nvcc. Install `pip install" in result.stderr
    assert '"nvidia-cuda-nvcc==13.0.*"' in result.stderr and b'"cuda": null' in library(cuda_tree)
    result = build(cuda_tree, TEST_TORCH_CUDA="12.8", **bare)
    assert "there is no nvcc. Install the CUDA toolkit 12.8, or set CUDA_HOME" in result.stderr
    shutil.copytree(cuda_tree / "installed", tmp_path / "with_wheels")
    write(tmp_path / "with_wheels" / "nvidia" / "cu13" / "bin" / "nvcc", NVCC).chmod(0o755)
    result = build(cuda_tree, MEGATRON_SAMOE_BUILD="cuda", PYTHONPATH=str(tmp_path / "with_wheels"), **bare)
    assert result.returncode == 0 and "cuda: 13.0.88" in result.stdout, result.stderr


@needs_compiler
@pytest.mark.parametrize("archs, wrong", [("9.0;Hopper", "'Hopper'"), ("7.0", "'7.0'"), (";", "';'")])
def test_a_wrong_list_of_gpus_is_refused(cuda_tree: Path, archs: str, wrong: str) -> None:
    result = build(cuda_tree, TORCH_CUDA_ARCH_LIST=archs)
    assert result.returncode != 0 and not library(cuda_tree)
    assert f"TORCH_CUDA_ARCH_LIST = {archs!r}: {wrong} is no compute capability" in result.stderr
    assert "8.0, 9.0, 10.3" in result.stderr


@needs_compiler
def test_a_compiler_without_openmp_or_avx512(cuda_tree: Path, tmp_path: Path) -> None:
    """And with a cache in front, which nvcc gets too."""
    script = f'#!/bin/sh\ncase "$*" in *-fopenmp*|*-mavx512f*) exit 1 ;; esac\nexec {COMPILER} "$@"\n'
    write(tmp_path / "bin" / "old", script).chmod(0o755)
    write(tmp_path / "bin" / "ccache", '#!/bin/sh\nexec "$@"\n').chmod(0o755)
    result = build(cuda_tree, MEGATRON_SAMOE_BUILD="cuda", CXX=f"{tmp_path}/bin/ccache {tmp_path}/bin/old")
    assert result.returncode == 0, result.stderr
    assert "note: The compiler has no OpenMP, so the kernels use one thread" in result.stderr
    if os.uname().machine == "x86_64":
        assert "note: The compiler knows no AVX-512" in result.stderr
    assert b'"openmp": false, "instruction_sets": ["portable"]' in library(cuda_tree)
    (stamp,) = cuda_tree.rglob("*k.cu.sha256")
    assert stamp.read_text().splitlines()[1] == f"{tmp_path}/bin/ccache"

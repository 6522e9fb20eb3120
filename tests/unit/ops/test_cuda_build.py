"""The CUDA half of the build, with a torch and an nvcc of the tests: which is found, what is built, what is said.

The torch has the attributes that the build reads and libraries of one function; the nvcc compiles with g++.
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
pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
    pytest.mark.skipif(not COMPILER, reason="no g++"),
]

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
NVCC = f"""#!/bin/sh
[ -z "$TEST_NVCC_ERROR" ] || case "$*" in *-c*) echo "$TEST_NVCC_ERROR" >&2; exit 2 ;; esac
case "$*" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    --list-gpu-arch) printf 'compute_80\\ncompute_90\\ncompute_103\\n' ;;
    *)  source= target=
        while [ $# -gt 0 ]; do
            case $1 in -c) source=$2 ;; -o) target=$2 ;; -MF) depend=$2 ;; esac
            shift
        done
        [ -z "$depend" ] || echo "$target: $source" > "$depend"
        [ -z "$TEST_NVCC_BAD_KERNEL" ] || case $source in *probe.cu) ;; *) echo "error: bad kernel" >&2; exit 1 ;; esac
        {COMPILER} -x c++ -D__global__= -fPIC -c "$source" -o "$target" ;;
esac
"""
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
def tree(tmp_path: Path, installed: Path) -> Path:
    """A source tree with a kernel and its binding, and a toolkit beside it."""
    for name in ("setup.py", "pyproject.toml", "cpp_ext/common/build_record.cpp", "megatron_samoe/ops/schemas.txt"):
        write(tmp_path / name, (ROOT / name).read_text())
    for path in (ROOT / "cpp_ext").glob("*.py"):
        shutil.copy(path, tmp_path / "cpp_ext")
    write(tmp_path / "README.md", "x")
    write(tmp_path / "megatron_samoe" / "__init__.py", '__version__ = "0"\n')
    write(tmp_path / "cpp_ext" / "kernels" / "cuda" / "k.cu", KERNEL)
    write(tmp_path / "cpp_ext" / "bindings" / "k_cuda.cpp", BINDING)
    write(tmp_path / "toolkit" / "bin" / "nvcc", NVCC).chmod(0o755)
    (tmp_path / "installed").symlink_to(installed)
    return tmp_path


def build(tree: Path, mode: str = "auto", **environment: str) -> subprocess.CompletedProcess:
    """Builds the tree against the torch of the tests, with the toolkit unless the environment says otherwise."""
    own = {
        "PYTHONPATH": str(tree / "installed"),
        "CUDA_HOME": str(tree / "toolkit"),
        "TEST_TORCH_CUDA": "13.0",
        "MEGATRON_SAMOE_BUILD": mode,
        "CXX": COMPILER,
    }
    cleared = ("TORCH_CUDA_ARCH_LIST", "CUDA_PATH", "CUDAHOSTCXX", "NVCC_CCBIN")
    inherited = {name: value for name, value in os.environ.items() if name not in cleared}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tree,
        env={**inherited, **own, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def library(tree: Path) -> bytes:
    path = tree / "megatron_samoe" / "_C.so"
    return path.read_bytes() if path.exists() else b""


def test_builds_the_kernels_and_records_them(tree: Path) -> None:
    result = build(tree, TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX")
    assert result.returncode == 0, result.stderr
    assert "3 of 3 compiled" in result.stdout and "cuda: 13.0.88" in result.stdout and "note" not in result.stderr
    content = library(tree)
    assert b"of_nvcc" in content and b"binding" in content and b"libcudart.so.13" in content
    assert rb'"cuda": "13.0.88", "cuda_archs": ["8.0", "9.0a+PTX"]' in content
    (stamp,) = tree.rglob("*k.cu.sha256")
    words = stamp.read_text().splitlines()[1:]
    assert words[1:3] == ["-ccbin", COMPILER]
    assert {"arch=compute_80,code=sm_80", "arch=compute_90a,code=[sm_90a,compute_90a]"} < set(words)
    assert "0 of 3 compiled" in build(tree, TORCH_CUDA_ARCH_LIST="8.0 9.0a+PTX").stdout
    # The default's flags differ, and so does the record.
    result = build(tree, mode="cuda")
    assert "2 of 3 compiled" in result.stdout and "cuda_archs: ['8.0', '9.0+PTX']" in result.stdout


def test_cpu_leaves_the_kernels_out(tree: Path) -> None:
    result = build(tree, mode="cpu", TORCH_CUDA_ARCH_LIST="nonsense")
    assert result.returncode == 0, result.stderr
    assert "1 of 1 compiled" in result.stdout and "note" not in result.stderr
    assert b"of_nvcc" not in library(tree) and b'"cuda": null' in library(tree)


# What is missing, and what is said of it.
LACKS = {
    "cuda_home": ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME = '/nowhere' has no bin/nvcc"),
    "same_major": ({"TEST_TORCH_CUDA": "12.8"}, "is of CUDA 13.0.88 and torch 2.99.0 was built for CUDA 12.8"),
    "old_enough_host": ({"TEST_NVCC_ERROR": TOO_NEW}, "name it with CUDAHOSTCXX. nvcc says: " + TOO_NEW),
    "working_nvcc": ({"TEST_NVCC_ERROR": "no cicc"}, "cannot compile an empty kernel: no cicc"),
    "good_kernel": ({"TEST_NVCC_BAD_KERNEL": "1"}, "error: bad kernel"),
}


@pytest.mark.parametrize("name", first_by_day(LACKS, 2))
def test_without_what_it_needs(tree: Path, name: str) -> None:
    environment, said = LACKS[name]
    result = build(tree, **environment)
    assert result.returncode == 0, result.stderr
    assert "note: The CUDA kernels are left out. " in result.stderr and said in result.stderr
    assert b'"cuda": null' in library(tree) and b"of_nvcc" not in library(tree)
    result = build(tree, mode="cuda", **environment)
    assert result.returncode != 0 and said in result.stderr and "Traceback" not in result.stderr


def test_without_nvcc(tree: Path, tmp_path: Path) -> None:
    """Without a toolkit on the machine, and then with NVIDIA's wheels as the toolkit."""
    builder = tree / "cpp_ext" / "cuda_toolkit.py"
    builder.write_text(builder.read_text().replace('Path("/usr/local/cuda")', 'Path("/nowhere")'))
    path = [part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "nvcc").exists()]
    if shutil.which("g++", path=os.pathsep.join(path)) is None:
        pytest.skip("g++ and nvcc lie in one folder")
    bare = {"CUDA_HOME": "", "PATH": os.pathsep.join(path), "CXX": "g++"}
    result = build(tree, **bare)
    assert result.returncode == 0, result.stderr
    assert "built for CUDA 13.0, and there is no nvcc. Install `pip install" in result.stderr
    assert '"nvidia-cuda-nvcc==13.0.*"' in result.stderr and b'"cuda": null' in library(tree)
    result = build(tree, TEST_TORCH_CUDA="12.8", **bare)
    assert "there is no nvcc. Install the CUDA toolkit 12.8, or set CUDA_HOME" in result.stderr
    shutil.copytree(tree / "installed", tmp_path / "with_wheels")
    write(tmp_path / "with_wheels" / "nvidia" / "cu13" / "bin" / "nvcc", NVCC).chmod(0o755)
    result = build(tree, mode="cuda", PYTHONPATH=str(tmp_path / "with_wheels"), **bare)
    assert result.returncode == 0 and "cuda: 13.0.88" in result.stdout, result.stderr


@pytest.mark.parametrize("archs, wrong", [("9.0;Hopper", "'Hopper'"), ("7.0", "'7.0'"), (";", "';'")])
def test_a_wrong_list_of_gpus_is_refused(tree: Path, archs: str, wrong: str) -> None:
    result = build(tree, TORCH_CUDA_ARCH_LIST=archs)
    assert result.returncode != 0 and not library(tree)
    assert f"TORCH_CUDA_ARCH_LIST = {archs!r}: {wrong} is no compute capability" in result.stderr
    assert "8.0, 9.0, 10.3" in result.stderr


def test_a_torch_without_cuda(tree: Path) -> None:
    result = build(tree, TEST_TORCH_CUDA="")
    assert result.returncode == 0 and "cuda: None" in result.stdout and "note" not in result.stderr
    result = build(tree, mode="cuda", TEST_TORCH_CUDA="")
    assert result.returncode != 0 and "torch 2.99.0 was built without CUDA" in result.stderr


def test_a_compiler_without_openmp_or_avx512(tree: Path, tmp_path: Path) -> None:
    """And with a cache in front, which nvcc gets too."""
    script = f'#!/bin/sh\ncase "$*" in *-fopenmp*|*-mavx512f*) exit 1 ;; esac\nexec {COMPILER} "$@"\n'
    write(tmp_path / "bin" / "old", script).chmod(0o755)
    write(tmp_path / "bin" / "ccache", '#!/bin/sh\nexec "$@"\n').chmod(0o755)
    result = build(tree, mode="cuda", CXX=f"{tmp_path}/bin/ccache {tmp_path}/bin/old")
    assert result.returncode == 0, result.stderr
    assert "note: The compiler has no OpenMP, so the kernels use one thread" in result.stderr
    if os.uname().machine == "x86_64":
        assert "note: The compiler knows no AVX-512" in result.stderr
    assert b'"openmp": false, "instruction_sets": ["portable"]' in library(tree)
    (stamp,) = tree.rglob("*k.cu.sha256")
    assert stamp.read_text().splitlines()[1] == f"{tmp_path}/bin/ccache"

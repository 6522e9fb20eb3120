"""The CUDA half of the build: which nvcc, for which GPUs, with which flags. It needs no GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from compiler import BuildError, SettingError, errors_of, run, split_launcher

DEFAULT_ARCHS = "8.0;9.0+PTX"
TOOLKIT = Path("/usr/local/cuda")


def wheels_of(torch) -> Path:
    """Returns the folder in which NVIDIA's wheels lie: beside the torch in use."""
    return Path(torch.__file__).parent.parent / "nvidia"


def find_nvcc(torch) -> str:
    """Returns the path of nvcc.

    Looked at, in order: $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda, NVIDIA's wheels. A variable that is set must
    name a toolkit. Errors: BuildError.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home and not (Path(home) / "bin" / "nvcc").is_file():
            raise BuildError(f"{name} = {home!r} has no bin/nvcc; name a CUDA toolkit or leave it unset.")
        if home:
            return str(Path(home) / "bin" / "nvcc")
    version = torch.version.cuda
    major = version.split(".")[0]
    on_path = shutil.which("nvcc")
    homes = (TOOLKIT, wheels_of(torch) / f"cu{major}")
    found = (
        [on_path] if on_path else [str(home / "bin" / "nvcc") for home in homes if (home / "bin" / "nvcc").is_file()]
    )
    if found:
        return found[0]
    wheels = " ".join(f'"nvidia-{name}=={version}.*"' for name in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime"))
    way = f"`pip install {wheels}`" if int(major) >= 13 else f"the CUDA toolkit {version}"
    raise BuildError(
        f"torch {torch.__version__} was built for CUDA {version}, and there is no nvcc. Install {way}, or set CUDA_HOME."
    )


def parse_archs(text: str, known: set[str]) -> list[str]:
    """Returns the compute capabilities of a list such as "8.0;9.0+PTX".

    known: what nvcc compiles for, as "80". Errors: SettingError, which names the part that is wrong.
    """
    archs = text.replace(" ", ";").split(";")
    archs = [arch for arch in archs if arch]
    for arch in archs or [text]:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", arch)
        if match is None or match[1] + match[2] not in known:
            numbers = ", ".join(f"{number[:-1]}.{number[-1]}" for number in sorted(known, key=int))
            raise SettingError(
                f"TORCH_CUDA_ARCH_LIST = {text!r}: {arch!r} is no compute capability that this nvcc compiles for. "
                f"Give some of {numbers}, separated by `;`, with +PTX behind those that later GPUs may use too."
            )
    return archs


class CudaToolkit:
    """nvcc, and the flags that follow from it.

    torch: the module that is built against. compiler: the C++ compiler's command; nvcc takes the same for the host, or
    what $CUDAHOSTCXX or $NVCC_CCBIN names, and the same cache in front. Errors: BuildError where it cannot be used.
    """

    def __init__(self, torch, compiler: list[str]) -> None:
        program = find_nvcc(torch)
        found = re.search(r"V(\d+)([.\d]*)", run([program, "--version"]))
        if found is None:
            raise BuildError(f"{program} does not say its version.")
        self.version = found[1] + found[2]
        if found[1] != torch.version.cuda.split(".")[0]:
            raise BuildError(
                f"{program} is of CUDA {self.version} and torch {torch.__version__} was built for CUDA "
                f"{torch.version.cuda}. Name a toolkit of the same major version with CUDA_HOME."
            )
        known = set(re.findall(r"compute_(\d+)\s", run([program, "--list-gpu-arch"]) + "\n"))
        self.archs = parse_archs(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS, known)
        launcher, own = split_launcher(compiler)
        self.host = os.environ.get("CUDAHOSTCXX") or os.environ.get("NVCC_CCBIN") or own[0]
        self.nvcc = [*launcher, program, "-ccbin", self.host]
        self.home = self._compile_nothing([program, "-ccbin", self.host])
        self.runtime = self._find_runtime(torch, found[1])
        # For the bindings and for the comparison of our NCCL declarations with NVIDIA's.
        headers = [self.home / "include", wheels_of(torch) / "nccl" / "include"]
        self.includes = [word for path in headers if path.is_dir() for word in ("-isystem", str(path))]

    def _compile_nothing(self, nvcc: list[str]) -> Path:
        """Tries nvcc and its host compiler. Returns the toolkit's folder, which nvcc knows even behind a wrapper."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cu"
            source.write_text("__global__ void probe() {}\n")
            command = [*nvcc, *self.flags(), "-v", "-c", str(source), "-o", str(source.with_suffix(".o"))]
            result = subprocess.run(command, capture_output=True, text=True)
        output = result.stdout + result.stderr
        if result.returncode == 0:
            top = re.search(r"^#\$ TOP=(.*)$", output, re.MULTILINE)
            return Path(top[1] if top else Path(nvcc[0]).parent.parent).resolve()
        reason = errors_of("\n".join(line for line in output.splitlines() if not line.startswith("#$")))[0].strip()
        if "unsupported" in output and "version" in output and "host_config" in output:
            raise BuildError(
                f"nvcc {self.version} does not take the compiler {self.host!r}, which is too new or too old for it. Install "
                "one that it takes, such as `apt-get install g++-12`, and name it with CUDAHOSTCXX. nvcc says: "
                + reason
            )
        raise BuildError(f"nvcc {self.version} with {self.host!r} cannot compile an empty kernel: {reason}")

    def _find_runtime(self, torch, major: str) -> Path:
        """Returns the CUDA runtime to link with; the wheels have no libcudart.so, so -lcudart would not do."""
        wheels = [wheels_of(torch) / part / "lib" for part in (f"cu{major}", "cuda_runtime")]
        toolkit = [self.home / "lib64", self.home / "lib", *self.home.glob("targets/*/lib")]
        for folder in (*wheels, *toolkit):
            if (folder / f"libcudart.so.{major}").is_file():
                return folder / f"libcudart.so.{major}"
        raise BuildError(f"The CUDA toolkit in {self.home} has no libcudart.so.{major}.")

    def flags(self) -> list[str]:
        """Returns nvcc's flags for a kernel."""
        flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
            flags += ["-gencode", f"arch=compute_{number},code={code}"]
        return flags

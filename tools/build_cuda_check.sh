#!/bin/sh
# Compiles the CUDA kernels with nvcc, and the bindings and the NCCL code against a CUDA torch and NVIDIA's nccl.h, on a machine that has neither a GPU nor
# that torch: both are unpacked into a folder (about 2 GB) and never imported. The toolkit's headers are found through
# CUDA_HOME. Prints versions and times.
#
#     tools/build_cuda_check.sh FOLDER [TORCH_VERSION]
set -eu
cd "$(dirname "$0")/.."
folder=${1:?"usage: $0 FOLDER [TORCH_VERSION]"}
version=${2:-2.12.1}
python=${PYTHON:-python3}
compiler=${CXX:-g++}
cuda=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")")}
[ -f "$cuda/include/cuda_runtime_api.h" ] || { echo "error: no CUDA toolkit in $cuda; set CUDA_HOME"; exit 1; }
[ -d "$folder/torch" ] || "$python" -m pip install --quiet --no-deps --target "$folder" "torch==$version"
[ -d "$folder/nvidia/nccl" ] || "$python" -m pip install --quiet --no-deps --target "$folder" nvidia-nccl-cu13
grep -q "^cuda: Optional\[str\] = '" "$folder/torch/version.py" || { echo "error: torch in $folder has no CUDA"; exit 1; }
sed -n "s/^__version__ = /torch /p" "$folder/torch/version.py"
sed -n 's/^#define NCCL_\(MAJOR\|MINOR\|PATCH\)/nccl \1/p' "$folder/nvidia/nccl/include/nccl.h"
$compiler --version | sed -n 1p
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
flags="-std=c++20 -O1 -fPIC -fopenmp -isystem $folder/torch/include -isystem $folder/torch/include/torch/csrc/api/include
    -isystem $folder/nvidia/nccl/include -isystem $cuda/include"
for source in cpp_ext/bindings/*.cpp cpp_ext/comm/*.cpp; do
    start=$(date +%s)
    # shellcheck disable=SC2086
    $compiler $flags -c "$source" -o "$objects/$(basename "$source" .cpp).o"
    echo "compiled $source in $(($(date +%s) - start)) s"
done
for source in cpp_ext/kernels/cuda/*.cu; do
    start=$(date +%s)
    "$cuda/bin/nvcc" -std=c++17 -O3 -lineinfo -gencode arch=compute_80,code=sm_80 \
        -gencode "arch=compute_90,code=[sm_90,compute_90]" -c "$source" -o "$objects/$(basename "$source").o"
    echo "compiled $source in $(($(date +%s) - start)) s"
done
echo "nccl_api.h agrees with nccl.h"

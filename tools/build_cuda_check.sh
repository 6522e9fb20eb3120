#!/bin/sh
# Builds the extension with its CUDA kernels, as an installation would (MEGATRON_SAMOE_BUILD=cuda), on a machine without
# a GPU: against a CUDA torch and NVIDIA's NCCL, unpacked into a folder (about 5 GB with their dependencies) beside the
# environment's own torch. Then loads the library there, tells which ops it has for CUDA, and runs its CPU ops. Prints
# versions and times. Needs nvcc and g++; nothing that it builds stays.
#
#     tools/build_cuda_check.sh FOLDER [TORCH_VERSION]
set -eu
cd "$(dirname "$0")/.."
folder=${1:?"usage: $0 FOLDER [TORCH_VERSION]"}
version=${2:-2.12.1}
python=${PYTHON:-python3}
[ -d "$folder/torch" ] || "$python" -m pip install --quiet --target "$folder" "torch==$version"
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
export PYTHONPATH="$folder:$PWD${PYTHONPATH:+:$PYTHONPATH}"
sed -n 's/^#define NCCL_\(MAJOR\|MINOR\|PATCH\)/nccl \1/p' "$folder/nvidia/nccl/include/nccl.h"
MEGATRON_SAMOE_BUILD=cuda "$python" setup.py --quiet build_ext --build-lib "$built" --build-temp "$built/objects"
echo "nccl_api.h agrees with nccl.h"
"$python" - "$built/megatron_samoe/_C.so" <<'PYTHON'
import sys

import torch

torch.ops.load_library(sys.argv[1])
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("megatron_samoe::")]
of_cuda = sorted(name.split("::")[1] for name in names if has_kernel(name, "CUDA"))
print(f"the library loads; {len(of_cuda)} ops have a CUDA kernel: {', '.join(of_cuda)}")
slots, rows, counts = torch.ops.megatron_samoe.make_permutation(torch.tensor([[1, 0], [1, 1]]), 2)
assert counts.tolist() == [1, 3] and slots.tolist() == [1, 0, 2, 3], (slots, rows, counts)
print("its CPU ops run, by", torch.ops.megatron_samoe.instruction_set())
PYTHON

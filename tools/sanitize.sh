#!/bin/sh
# Builds the torch-free part of the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs its check for
# each instruction set this machine has. Needs g++ (or CXX).
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
compiler=${CXX:-g++}
flags="-std=c++17 -O1 -g -fopenmp -fno-math-errno -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
sets=""
if [ "$(uname -m)" = x86_64 ]; then
    flags="$flags -DSAMOE_WITH_X86_SETS"
    sets="avx2 avx512"
fi
for set in portable $sets; do
    case $set in
        avx2) extra="-mavx2 -mfma" ;;
        avx512) extra="-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq" ;;
        *) extra="" ;;
    esac
    for source in cpp_ext/kernels/cpu/simd/*.cpp; do
        # shellcheck disable=SC2086
        $compiler $flags $extra -DSAMOE_ISA="$set" -c "$source" -o "$folder/$(basename "$source" .cpp).$set.o"
    done
done
# shellcheck disable=SC2086
$compiler $flags cpp_ext/testing/check_kernels.cpp cpp_ext/kernels/cpu/dispatch.cpp cpp_ext/kernels/cpu/counting_sort.cpp \
    cpp_ext/comm/*.cpp "$folder"/*.o -o "$folder/check"
# gcc 12 misaligns 64-byte variables on the fake stack that this option brings (gcc bug 110027).
export ASAN_OPTIONS=detect_stack_use_after_return=0
for set in portable $sets; do
    MEGATRON_SAMOE_ISA=$set OMP_NUM_THREADS=2 "$folder/check"
done

#!/bin/sh
# Cross-builds the torch-free part of the extension for ARM64 and runs its checks (cpp_ext/testing) under qemu. It needs
# g++-aarch64-linux-gnu (or ARM_CXX) and qemu-user.
set -eu
cd "$(dirname "$0")/.."
compiler=${ARM_CXX:-aarch64-linux-gnu-g++}
for program in "$compiler" qemu-aarch64; do
    command -v "$program" > /dev/null || { echo "error: there is no $program: apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for source in cpp_ext/kernels/cpu/simd/*.cpp cpp_ext/kernels/cpu/dispatch.cpp cpp_ext/kernels/cpu/counting_sort.cpp \
    cpp_ext/comm/*.cpp cpp_ext/testing/kernels/check_kernels.cpp cpp_ext/testing/kernels/check_decode.cpp \
    cpp_ext/testing/row_exchange/check_exchange.cpp; do
    case $source in */simd/*) set=-DSAMOE_ISA=portable ;; *) set= ;; esac
    echo "$compiler -std=c++17 -O3 -fno-math-errno -fopenmp $set -c $source -o $folder/$(basename "$source" .cpp).o"
done | xargs -P "${JOBS:-$(nproc)}" -d '\n' -n 1 sh -c
cd "$folder"
mkdir checks
mv check_*.o checks
export OMP_NUM_THREADS=2
for check in check_kernels check_decode "check_exchange threads" "check_exchange processes"; do
    name=${check%% *}
    "$compiler" -fopenmp ./*.o "checks/$name.o" -ldl -o "$name"
    # shellcheck disable=SC2086
    qemu-aarch64 -L /usr/aarch64-linux-gnu ./$check
done

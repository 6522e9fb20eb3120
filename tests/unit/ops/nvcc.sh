#!/bin/sh
# NVIDIA's compiler as far as a build asks it, by g++.
[ -z "$TEST_NVCC_ERROR" ] || case "$*" in *-c*) echo "$TEST_NVCC_ERROR" >&2; exit 2 ;; esac
case "$*" in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    --list-gpu-arch) printf 'compute_80\ncompute_90\ncompute_103\n' ;;
    *)  source= target=
        while [ $# -gt 0 ]; do
            case $1 in -c) source=$2 ;; -o) target=$2 ;; -MF) depend=$2 ;; esac
            shift
        done
        [ -z "$depend" ] || echo "$target: $source" > "$depend"
        [ -z "$TEST_NVCC_BAD_KERNEL" ] || case $source in *probe.cu) ;; *) echo "error: bad kernel" >&2; exit 1 ;; esac
        "$TEST_CXX" -x c++ -D__global__= -fPIC -c "$source" -o "$target" ;;
esac

#!/bin/sh
# Builds the torch-free part of the extension with the sanitizers of g++ (or CXX) and runs its checks (cpp_ext/testing):
# - AddressSanitizer and UndefinedBehaviorSanitizer: the kernels of each instruction set that this machine has, the CUDA
#   kernels in their emulation, the shared-memory exchange between processes and between threads, and the NCCL exchange
#   over the stand-in for NCCL;
# - ThreadSanitizer: the portable kernels and both exchanges, with OpenMP's calls answered by std::thread.
# JOBS compilers run at once, by default one for each core.
set -eu
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/asan/kernels" "$folder/asan/comm" "$folder/tsan/kernels" "$folder/tsan/comm" "$folder/cuda"
compiler=${CXX:-g++}
flags="-std=c++17 -O1 -g -fno-math-errno -fno-omit-frame-pointer -fno-sanitize-recover=all"
asan="-fsanitize=address,undefined"
tsan="-fsanitize=thread -Wno-tsan" # which warns of fences; they order here, and no data depends on them
openmp="-fopenmp"
x86_sets=""
[ "$(uname -m)" != x86_64 ] || x86_sets="avx2 avx512"

# compile OBJECT SOURCE FLAGS: only notes the command; build runs them all.
compile() {
    object=$1 source=$2
    shift 2
    echo "$compiler $flags $* -c $source -o $folder/$object" >> "$folder/commands"
}
build() { xargs -P "${JOBS:-$(nproc)}" -d '\n' -n 1 sh -c < "$folder/commands"; }

# compile_kernels FOLDER SETS FLAGS
compile_kernels() {
    target=$1 sets=$2
    shift 2
    for set in $sets; do
        case $set in
            avx2) extra="-mavx2 -mfma" ;;
            avx512) extra="-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq" ;;
            *) extra="" ;;
        esac
        for source in cpp_ext/kernels/cpu/simd/*.cpp; do
            compile "$target/$(basename "$source" .cpp).$set.o" "$source" "$* $openmp $extra -DSAMOE_ISA=$set"
        done
    done
    [ "$sets" = portable ] || extra="-DSAMOE_WITH_X86_SETS"
    compile "$target/dispatch.o" cpp_ext/kernels/cpu/dispatch.cpp "$* $openmp $extra"
    compile "$target/counting_sort.o" cpp_ext/kernels/cpu/counting_sort.cpp "$* $openmp"
}

compile_kernels asan/kernels "portable${x86_sets:+ $x86_sets}" "$asan"
compile_kernels tsan/kernels portable "$tsan"
for kind in asan tsan; do
    [ $kind = asan ] && sanitizer=$asan || sanitizer=$tsan
    for source in cpp_ext/comm/*.cpp; do
        compile "$kind/comm/$(basename "$source" .cpp).o" "$source" "$sanitizer"
    done
    for name in kernels/check_kernels kernels/check_decode row_exchange/check_exchange row_exchange/check_nccl; do
        compile "$kind/$(basename $name).o" cpp_ext/testing/$name.cpp "$sanitizer"
    done
    compile $kind/fake_nccl.o cpp_ext/testing/stand_ins/fake_nccl.cpp "-fPIC $sanitizer"
done
compile tsan/openmp.o cpp_ext/testing/stand_ins/openmp_threads.cpp "$tsan"
# The emulated kernels, on one thread, are compared with the portable set.
for source in cpp_ext/kernels/cuda/*.cu; do
    compile "cuda/$(basename "$source" .cu).o" "$source" "-x c++ -Wno-unknown-pragmas $asan"
done
mkdir "$folder/cuda/checks"
for name in check_cuda_kernels check_cuda_decode; do
    compile cuda/checks/$name.o cpp_ext/testing/kernels/$name.cpp "$asan"
done
compile cuda/dispatch.o cpp_ext/kernels/cpu/dispatch.cpp "$asan"
build

cd "$folder"
# shellcheck disable=SC2086
for name in check_kernels check_decode check_exchange check_nccl; do
    $compiler $asan $openmp asan/kernels/*.o asan/comm/*.o asan/$name.o -o asan/$name
    $compiler $tsan tsan/kernels/*.o tsan/comm/*.o tsan/$name.o tsan/openmp.o -o tsan/$name
done
# shellcheck disable=SC2086
{
    $compiler -shared -Wl,-soname,libcudart.so $asan asan/fake_nccl.o -o asan/libnccl.so
    $compiler -shared -Wl,-soname,libcudart.so $tsan tsan/fake_nccl.o -o tsan/libnccl.so
}
# shellcheck disable=SC2086
for name in check_cuda_kernels check_cuda_decode; do
    $compiler $asan $openmp cuda/*.o cuda/checks/$name.o asan/kernels/*.portable.o asan/kernels/counting_sort.o -o cuda/$name
done

# gcc 12 misaligns 64-byte variables on the fake stack that this option brings (gcc bug 110027).
export ASAN_OPTIONS=detect_stack_use_after_return=0
export OMP_NUM_THREADS=2
echo "AddressSanitizer, UndefinedBehaviorSanitizer:"
for set in portable $x86_sets; do
    MEGATRON_SAMOE_ISA=$set asan/check_kernels
    MEGATRON_SAMOE_ISA=$set asan/check_decode
done
asan/check_exchange processes
asan/check_exchange threads
MEGATRON_SAMOE_NCCL_LIB=asan/libnccl.so asan/check_nccl
cuda/check_cuda_kernels 33
cuda/check_cuda_decode 13
echo "ThreadSanitizer:"
tsan/check_kernels
tsan/check_decode
tsan/check_exchange threads
MEGATRON_SAMOE_NCCL_LIB=tsan/libnccl.so tsan/check_nccl

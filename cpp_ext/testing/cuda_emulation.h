// CUDA's execution of a grid on one host thread, so that the kernels' own source runs under g++, with its sanitizers and
// without a GPU. Blocks run one after another; the threads of a block are fibers that take turns at barriers and warp
// exchanges. Seen are wrong results, steps outside memory (AddressSanitizer), misaligned wide accesses (UBSan), and
// barriers or exchanges that not all threads reach. Not seen are races between two barriers, what only the device's
// compiler or memory does, and time.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another

struct CUstream_st;
typedef CUstream_st* cudaStream_t;

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx;

namespace samoe {
namespace emulation {

constexpr size_t kStackBytes = size_t{64} << 10;
constexpr unsigned kThreads = 256, kLanes = 32;

// All of `expected` threads have arrived, or the fiber lets others run.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  void wait(unsigned expected);
};

// What the lanes of a warp show each other: two sets of slots, so that a lane may be one exchange ahead.
struct Warp {
  Barrier barrier;
  uint64_t slots[2][kLanes];
};

class Block {
 public:
  // The only one: a stream runs one kernel after another.
  static Block& running() {
    static Block block(kThreads);
    return block;
  }

  explicit Block(unsigned num_threads) : fibers_(num_threads), warps(num_threads / kLanes) {
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStackBytes]);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs the body once for every thread of a block.
  void run(const std::function<void()>& body) {
    body_ = &body;
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      fiber.done = false;
      fiber.turn = 0;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    barrier = Barrier();
    for (Warp& warp : warps) warp.barrier = Barrier();
    size_t left = fibers_.size();
    while (left > 0) {
      progress_ = false;
      for (unsigned i = 0; i < fibers_.size(); ++i) {
        if (fibers_[i].done) continue;
        threadIdx.x = i;
        switch_to(i);
        if (fibers_[i].done) --left;
      }
      if (!progress_) fail("threads wait for others that have left or wait elsewhere");
    }
  }

  void yield() {
    Fiber& fiber = fibers_[current_];
    const unsigned thread = current_;
    leave(fiber, false);
    threadIdx.x = thread;
  }
  void note_progress() { progress_ = true; }
  unsigned num_threads() const { return static_cast<unsigned>(fibers_.size()); }
  unsigned& turn() { return fibers_[current_].turn; }

  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
    std::abort();
  }

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;
    unsigned turn = 0;
    bool done = false;
  };

  static void enter() {
    Block& block = running();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_size_);
#endif
    (*block.body_)();
    Fiber& fiber = block.fibers_[block.current_];
    fiber.done = true;
    block.note_progress();
    block.leave(fiber, true);
  }

  void switch_to(unsigned i) {
    current_ = i;
    Fiber& fiber = fibers_[i];
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
    swapcontext(&main_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
    swapcontext(&main_, &fiber.context);
#endif
  }

  void leave(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, main_stack_, main_size_);
    swapcontext(&fiber.context, &main_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#else
    (void)for_good;
    swapcontext(&fiber.context, &main_);
#endif
  }

  std::vector<Fiber> fibers_;
  ucontext_t main_;
  const std::function<void()>* body_ = nullptr;
  unsigned current_ = 0;
  bool progress_ = false;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;

 public:
  Barrier barrier;
  std::vector<Warp> warps;
};

inline void Barrier::wait(unsigned expected) {
  const unsigned mine = generation;
  Block::running().note_progress();
  if (++arrived == expected) {
    arrived = 0;
    ++generation;
    return;
  }
  while (generation == mine) Block::running().yield();
}

// Shows a value to the warp and returns what all lanes show.
template <typename T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "one slot a lane");
  if (mask != 0xffffffffu) Block::fail("only whole warps are emulated");
  Block& block = Block::running();
  Warp& warp = block.warps[threadIdx.x / kLanes];
  uint64_t* slots = warp.slots[block.turn()++ % 2];
  std::memcpy(&slots[threadIdx.x % kLanes], &value, sizeof value);
  warp.barrier.wait(kLanes);
  return slots;
}

}  // namespace emulation

namespace cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t num_blocks, cudaStream_t, Arguments... arguments) {
  emulation::Block& block = emulation::Block::running();
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (int64_t i = 0; i < num_blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    block.run(body);
  }
}

}  // namespace cuda
}  // namespace samoe

inline void __syncthreads() {
  auto& block = samoe::emulation::Block::running();
  block.barrier.wait(block.num_threads());
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  const uint64_t* slots = samoe::emulation::exchange(mask, value);
  T result;
  std::memcpy(&result, &slots[threadIdx.x % 32 ^ static_cast<unsigned>(lanes)], sizeof result);
  return result;
}

inline unsigned __match_any_sync(unsigned mask, int value) {
  const uint64_t* slots = samoe::emulation::exchange(mask, static_cast<int64_t>(value));
  unsigned same = 0;
  for (unsigned lane = 0; lane < 32; ++lane) same |= (static_cast<int64_t>(slots[lane]) == value ? 1u : 0u) << lane;
  return same;
}

inline void __syncwarp() { samoe::emulation::exchange(0xffffffffu, 0); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long value) {
  const unsigned long long before = *p;
  *p += value;
  return before;
}
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long value) {
  const unsigned long long before = *p;
  *p = value < before ? value : before;
  return before;
}

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline cudaError_t cudaMemsetAsync(void* p, int byte, size_t num_bytes, cudaStream_t) {
  if (num_bytes > 0) std::memset(p, byte, num_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
// The emulated device is of no capability, or of SAMOE_EMULATED_CAPABILITY: 90 lets it pass for a Hopper.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* asked = std::getenv("SAMOE_EMULATED_CAPABILITY");
  const int capability = asked == nullptr ? 0 : std::atoi(asked);
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
  return cudaSuccess;
}

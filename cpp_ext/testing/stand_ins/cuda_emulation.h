// CUDA's execution of a grid on one host thread, so that the kernels' own source runs under g++, with its sanitizers and
// without a GPU. Blocks run one after another; the threads of a block are fibers that take turns at barriers and warp
// exchanges. SAMOE_EMULATED_ORDER=ascending|descending|shuffled says in which order blocks, and threads between two
// barriers, have their turns. Seen are wrong results, also those that another order shows, steps outside memory
// (AddressSanitizer), misaligned wide accesses (UBSan), and barriers or exchanges that not all threads reach. Not seen are
// races of single instructions, what only the device's compiler or memory does, and time. An assertion of a kernel ends its
// grid, and the launch returns the error that a device has for it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

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

// The order in which the blocks of a grid, or the threads of a block, have their turns.
inline void set_order(std::vector<unsigned>& turns) {
  static const char* const asked = std::getenv("SAMOE_EMULATED_ORDER");
  static std::mt19937 random_bits(1);
  std::iota(turns.begin(), turns.end(), 0u);
  if (asked == nullptr || std::strcmp(asked, "ascending") == 0) return;
  if (std::strcmp(asked, "descending") == 0) {
    std::reverse(turns.begin(), turns.end());
  } else if (std::strcmp(asked, "shuffled") == 0) {
    std::shuffle(turns.begin(), turns.end(), random_bits);
  } else {
    std::fprintf(stderr, "SAMOE_EMULATED_ORDER = '%s': one of ascending, descending, shuffled\n", asked);
    std::abort();
  }
}

class Block {
 public:
  // The only one: a stream runs one kernel after another. Never destroyed, as its fibers never end.
  static Block& running() {
    static Block* const block = new Block(kThreads);
    return *block;
  }

  explicit Block(unsigned num_threads) : fibers_(num_threads), turns_(num_threads), warps(num_threads / kLanes) {
    make_fibers();
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs the body once for every thread of a block; returns false where one of them stopped all.
  bool run(const std::function<void()>& body) {
    body_ = &body;
    for (Fiber& fiber : fibers_) {
      fiber.done = false;
      fiber.turn = 0;
    }
    barrier = Barrier();
    for (Warp& warp : warps) warp.barrier = Barrier();
    size_t left = fibers_.size();
    while (left > 0) {
      progress_ = false;
      set_order(turns_);
      for (const unsigned i : turns_) {
        if (fibers_[i].done) continue;
        threadIdx.x = i;
        switch_to(i);
        if (stopped_) {
          make_fibers();
          return false;
        }
        if (fibers_[i].done) --left;
      }
      if (!progress_) fail("threads wait for others that have left or wait elsewhere");
    }
    body_ = nullptr;
    return true;
  }

  // Ends the grid of the running thread.
  [[noreturn]] static void stop(const char* what) {
    Block& block = running();
    if (block.body_ == nullptr) {
      std::fprintf(stderr, "a launcher asserts: %s\n", what);
      std::abort();
    }
    std::fprintf(stderr, "emulated kernel, block %u, thread %u asserts: %s\n", blockIdx.x, threadIdx.x, what);
    block.stopped_ = true;
    block.leave(block.fibers_[block.current_]);
    std::abort();  // nobody comes back
  }

  void yield() {
    Fiber& fiber = fibers_[current_];
    const unsigned thread = current_;
    leave(fiber);
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
    unsigned turn = 0;
    bool done = false;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#else
    jmp_buf place;
    bool started = false;
#endif
  };

  void make_fibers() {
    for (Fiber& fiber : fibers_) {
      fiber = Fiber();
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Block::enter, 0);
    }
    stopped_ = false;
    body_ = nullptr;
  }

  // A fiber's life: a thread of one block after another.
  static void enter() {
    Block& block = running();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.main_stack_, &block.main_size_);
#endif
    for (;;) {
      (*block.body_)();
      Fiber& fiber = block.fibers_[block.current_];
      fiber.done = true;
      block.note_progress();
      block.leave(fiber);
    }
  }

#if defined(__SANITIZE_ADDRESS__)
  void switch_to(unsigned i) {
    current_ = i;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fibers_[i].stack.get(), kStackBytes);
    swapcontext(&main_, &fibers_[i].context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  void leave(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fiber.fake_stack, main_stack_, main_size_);
    swapcontext(&fiber.context, &main_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
  }

  ucontext_t main_;
  const void* main_stack_ = nullptr;
  size_t main_size_ = 0;
#else
  // swapcontext asks the kernel for the signal mask at each switch, which took half of the time.
  void switch_to(unsigned i) {
    current_ = i;
    Fiber& fiber = fibers_[i];
    if (_setjmp(main_) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }

  void leave(Fiber& fiber) {
    if (_setjmp(fiber.place) == 0) _longjmp(main_, 1);
  }

  jmp_buf main_;
#endif

  std::vector<Fiber> fibers_;
  std::vector<unsigned> turns_;
  const std::function<void()>* body_ = nullptr;
  unsigned current_ = 0;
  bool progress_ = false, stopped_ = false;

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

inline int64_t num_launches = 0;  // kernels started

}  // namespace emulation
}  // namespace samoe

typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorNotReady = 600, cudaErrorAssert = 710;

namespace samoe {
namespace emulation {

inline cudaError_t refusal = cudaSuccess;     // what the next launch is answered, and does not start
inline cudaError_t last_error = cudaSuccess;  // of the thread, left by whoever met it
inline cudaError_t device_error = cudaSuccess;  // of a kernel that failed: the answer to all calls, until it is taken

}  // namespace emulation

namespace cuda {

template <typename... Parameters>
cudaError_t start_kernel(void (*kernel)(Parameters...), unsigned num_blocks, cudaStream_t, Parameters... arguments) {
  if (const cudaError_t error = std::exchange(emulation::refusal, cudaSuccess); error != cudaSuccess) {
    return emulation::last_error = error;
  }
  ++emulation::num_launches;
  emulation::Block& block = emulation::Block::running();
  const std::function<void()> body = [&] { kernel(arguments...); };
  std::vector<unsigned> turns(num_blocks);
  emulation::set_order(turns);
  for (const unsigned i : turns) {
    blockIdx.x = i;
    if (!block.run(body)) return emulation::last_error = emulation::device_error = cudaErrorAssert;
  }
  return cudaSuccess;
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

inline unsigned __ballot_sync(unsigned mask, bool holds) {
  const uint64_t* slots = samoe::emulation::exchange(mask, static_cast<uint64_t>(holds));
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) lanes |= static_cast<unsigned>(slots[lane]) << lane;
  return lanes;
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
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long value) {
  const unsigned long long before = *p;
  *p = value < before ? value : before;
  return before;
}

inline cudaError_t cudaStreamQuery(cudaStream_t) { return samoe::emulation::device_error; }
// A device would go on with its own error.
inline cudaError_t cudaGetLastError() {
  samoe::emulation::device_error = cudaSuccess;
  return std::exchange(samoe::emulation::last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorAssert ? "device-side assert triggered" : "invalid configuration argument";
}

#undef assert
#define assert(condition) ((condition) ? static_cast<void>(0) : samoe::emulation::Block::stop(#condition))

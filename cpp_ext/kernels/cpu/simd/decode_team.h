// The threads of one call of inference, from a parallel region that is opened once: how they divide work, and where they
// wait for each other.
//
// A kernel's part for one thread is a function that takes its Member; the functions of a step's kernels are declared
// below. Rows of tokens are made by the member that owns them, from the norm to the packed form, so that nobody waits in
// between; tasks go to whoever is free.
#pragma once

#include <sched.h>

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../../decode.h"
#include "decode_block.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

// A member's share of a call's tasks, by what is taken of it. The member takes from the front, so that it reads one stretch of
// memory and its counter stays in its cache; those that have nothing left of their own take from the back. A counter that all
// share costs 0.3 us a time where cores lie on different dies, and its tasks lie apart: 5 to 8 % of a step in int8, 2 % in bf16.
struct alignas(64) Share {
  uint64_t taken = 0;  // 16 bits: by which call; 24: from the front; 24: from the back
};

struct Team {
  explicit Team(Share* shares) : shares(shares) {}
  alignas(64) int arrived = 0;
  alignas(64) int turn = 0;
  Share* const shares;  // a member's each
};

// One thread of a team. All members make the same calls of wait and tasks, in the same order.
class Member {
 public:
  explicit Member(Team& team) : team_(team) {
#if defined(_OPENMP)
    number_ = omp_get_thread_num();
    size_ = omp_get_num_threads();
#endif
  }

  int number() const { return number_; }
  int size() const { return size_; }

  // Returns when all members have come here: what they wrote before is visible then.
  void wait() {
    if (size_ == 1) return;
    const int turn = __atomic_load_n(&team_.turn, __ATOMIC_RELAXED);  // it cannot change before this member arrives
    if (__atomic_add_fetch(&team_.arrived, 1, __ATOMIC_ACQ_REL) == size_) {
      __atomic_store_n(&team_.arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&team_.turn, turn + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&team_.turn, __ATOMIC_ACQUIRE) == turn;) {
      if (spins < kSpins) {
        ++spins;
        pause();
      } else {
        sched_yield();  // others need a core: perhaps the one that is waited for
      }
    }
  }

  // Calls work(i) for this member's own of num rows.
  template <typename Work>
  void own(int64_t num, Work work) const {
    for (int64_t i = number_; i < num; i += size_) work(i);
  }

  // The first task that this member takes of the next call; num if it has none of its own.
  int64_t next_task(int64_t num) const { return begin_of(num, number_) < begin_of(num, number_ + 1) ? begin_of(num, number_) : num; }

  // Calls work(task, after) for those of num tasks that this member takes; `after` is the task that it will most likely take
  // next, so that it can ask for that one's weights in time. From num on these are tasks of the next call, which has `then`.
  template <typename Work>
  void tasks(int64_t num, Work work, int64_t then = 0) {
    ++call_;
    const int64_t later = num + begin_of(then, number_);
    for (int i = 0; i < size_; ++i) {
      const int owner = (number_ + i) % size_;
      const int64_t begin = begin_of(num, owner), end = begin_of(num, owner + 1);
      for (int64_t taken = 0; begin < end && (taken = take(team_.shares[owner], end - begin, i == 0)) >= 0;) {
        const int64_t task = i == 0 ? begin + taken : end - 1 - taken;
        work(task, i == 0 && task + 1 < end ? task + 1 : later);
      }
    }
  }

 private:
  static constexpr int kSpins = 1 << 12;  // about 0.1 ms

  int64_t begin_of(int64_t num, int member) const { return num * member / size_; }

  // Takes a task of a share of num; returns how many were taken from that end before, or -1 if none is left. A member leaves a
  // call when all shares are empty; so if a share is of a later call, none of its tasks of this one is left, and if of an earlier
  // one, none is taken.
  int64_t take(Share& share, int64_t num, bool from_front) const {
    constexpr uint64_t kMask = (1 << 24) - 1;
    uint64_t seen = __atomic_load_n(&share.taken, __ATOMIC_RELAXED), now;
    int64_t front, back;
    do {
      if (seen >> 48 > call_) return -1;
      const uint64_t known = seen >> 48 == call_ ? seen : call_ << 48;
      front = static_cast<int64_t>(known >> 24 & kMask), back = static_cast<int64_t>(known & kMask);
      if (front + back >= num) return -1;
      now = known + (from_front ? 1 << 24 : 1);
    } while (!__atomic_compare_exchange_n(&share.taken, &seen, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return from_front ? front : back;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Team& team_;
  int number_ = 0, size_ = 1;
  uint64_t call_ = 0;
};

// Runs work(member) on every thread of a team.
template <typename Work>
SAMOE_INLINE void run_team(int num_threads, Work work) {
  static thread_local ThreadMemory memory;
  const size_t bytes = static_cast<size_t>(num_threads) * sizeof(Share);
  Team team(static_cast<Share*>(memset(memory.bytes(static_cast<int64_t>(bytes)), 0, bytes)));
#pragma omp parallel num_threads(num_threads)
  {
    Member member(team);
    work(member);
  }
}

// Packs a member's own rows.
SAMOE_INLINE void pack_own(const Member& member, const PackedRows& rows, int64_t num_rows) {
  if (rows.packed != nullptr) member.own(num_rows, [&](int64_t row) { rows.pack(row); });
}

// A member's own rows of a norm.
void norm_own(const Member& member, const DecodeNorm& a);
// A member's tasks of a linear layer, whose rows all members see packed; and, before them, the first weights that they read.
void linear_tasks(Member& member, const DecodeLinear& a, const PackedRows& rows);
void ask_for_linear(const Member& member, const DecodeLinear& a);
// Attention, between two waits. Results are packed where rows take the parts that `attention_part` says.
void attention_tasks(Member& member, const DecodeAttention& a, const PackedRows* packed);
SAMOE_INLINE int64_t attention_part(const DecodeAttention& a) { return a.queries_per_kv * a.head_dim; }
// A member's tasks of the chosen experts' two products, with a wait in between; the tokens are seen packed. `memory` holds
// `expert_memory_bytes`.
void experts_tasks(Member& member, const DecodeExperts& a, const PackedRows& tokens, void* memory);
int64_t expert_memory_bytes(const DecodeExperts& a);
// A member's own tokens of the experts' weighted sum.
void combine_own(const Member& member, const DecodeExperts& a);
// One token of a router (gate.cpp): its probs and ids. work: `choice_floats` floats.
void choose_experts(const DecodeChoice& a, int64_t token, float* work);
int64_t choice_floats(int64_t num_experts);

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe

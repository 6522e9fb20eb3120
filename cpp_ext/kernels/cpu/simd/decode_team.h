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

struct Team {
  alignas(64) int arrived = 0;
  alignas(64) int turn = 0;
  alignas(64) int64_t next_ticket = 0;
};

// Tasks that follow each other and that one member takes: many at first, so that it reads long stretches of memory, then
// ever fewer, so that all members end together; never more than `most`. At the end there is none, and the index is the number
// of stretches.
struct Stretch {
  Stretch(int64_t num_tasks, int num_members, int64_t most_tasks) : num(num_tasks), size(num_members), most(most_tasks) {
    measure();
  }

  void advance(int64_t to) {
    while (index < to && count > 0) {
      first += count;
      ++index;
      measure();
    }
  }
  void measure() {
    const int64_t left = num - first, share = size == 1 ? left : left / (2 * size);
    count = left > 0 && share < 1 ? 1 : (share < most ? share : most);
  }

  int64_t num, size, most, index = 0, first = 0, count = 0;
};

// One thread of a team. All members make the same calls of wait and tasks, in the same order.
class Member {
 public:
  static constexpr int64_t kAnyNumber = INT64_MAX;

  explicit Member(Team& team) : team_(team) {
#if defined(_OPENMP)
    number_ = omp_get_thread_num();
    size_ = omp_get_num_threads();
#endif
    ticket_ = take();
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

  // The first task that this member takes of the next call, if it takes any.
  int64_t next_task(int64_t num, int64_t most) const {
    Stretch mine(num, size_, most);
    mine.advance(ticket_ - done_);
    return mine.first;
  }

  // Calls work(task, after) for those of num tasks that this member takes; `after` is the task that it will take next,
  // so that it can ask for that one's weights in time. From num on these are tasks of the next call, which has `then`.
  // It takes at most `most` at a time: 1 where tasks are of different sizes, so that one member does not get all the large ones.
  template <typename Work>
  void tasks(int64_t num, Work work, int64_t then = 0, int64_t most = kAnyNumber) {
    Stretch mine(num, size_, most);
    mine.advance(ticket_ - done_);
    while (mine.count > 0) {
      ticket_ = take();
      Stretch following = mine;
      following.advance(ticket_ - done_);
      int64_t after = following.first;
      if (following.count == 0) {
        Stretch later(then, size_, most);
        later.advance(ticket_ - done_ - following.index);
        after += later.first;
      }
      const int64_t last = mine.first + mine.count - 1;
      for (int64_t task = mine.first; task < last; ++task) work(task, task + 1);
      work(last, after);
      mine = following;
    }
    done_ += mine.index;
  }

 private:
  static constexpr int kSpins = 1 << 12;  // about 0.1 ms

  int64_t take() { return __atomic_fetch_add(&team_.next_ticket, 1, __ATOMIC_RELAXED); }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Team& team_;
  int number_ = 0, size_ = 1;
  // Every ticket is a stretch of tasks: of the calls so far, `done_` of them, or of those to come.
  int64_t ticket_ = 0, done_ = 0;
};

// Runs work(member) on every thread of a team.
template <typename Work>
SAMOE_INLINE void run_team(int num_threads, Work work) {
  Team team;
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

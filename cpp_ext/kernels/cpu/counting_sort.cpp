// The counting sort behind a permutation.
#include <cstring>

#include "../kernels.h"

namespace samoe {
namespace cpu {

int64_t num_slot_chunks(int64_t num_slots, int64_t num_experts, int num_threads) {
  // A chunk pays for its own counters and for waking its thread, which on a busy machine costs more than the sort.
  const int64_t by_counters = num_slots / (16 * (num_experts + 64)), by_work = num_slots / 32768;
  const int64_t useful = by_counters < by_work ? by_counters : by_work;
  return useful < 1 ? 1 : (useful < num_threads ? useful : num_threads);
}

int64_t count_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t num_chunks, int64_t* counts_E,
                    int64_t* cursor, int64_t* bad_id, int num_threads) {
  std::memset(cursor, 0, static_cast<size_t>(num_chunks * num_experts) * sizeof(int64_t));
  const int64_t chunk_slots = (num_slots + num_chunks - 1) / num_chunks;
  bool bad = false;
#pragma omp parallel for schedule(static) num_threads(num_threads) reduction(|| : bad)
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    int64_t* counts = cursor + chunk * num_experts;
    const int64_t last = (chunk + 1) * chunk_slots < num_slots ? (chunk + 1) * chunk_slots : num_slots;
    for (int64_t slot = chunk * chunk_slots; slot < last; ++slot) {
      const int64_t id = ids_S[slot];
      if (id >= 0 && id < num_experts) {
        ++counts[id];
      } else if (id != -1) {
        bad = true;
      }
    }
  }
  if (bad) {
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (ids_S[slot] < -1 || ids_S[slot] >= num_experts) {
        *bad_id = ids_S[slot];
        return -1;
      }
    }
  }
  // Counts become the places where each chunk starts to write: experts in order, inside an expert chunks in order.
  int64_t place = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t first = place;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      const int64_t count = cursor[chunk * num_experts + expert];
      cursor[chunk * num_experts + expert] = place;
      place += count;
    }
    counts_E[expert] = place - first;
  }
  return place;
}

void place_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t num_chunks, int64_t* cursor,
                 int64_t* slot_of_row_N, int64_t* row_of_slot_S, int num_threads) {
  const int64_t chunk_slots = (num_slots + num_chunks - 1) / num_chunks;
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    int64_t* place = cursor + chunk * num_experts;
    const int64_t last = (chunk + 1) * chunk_slots < num_slots ? (chunk + 1) * chunk_slots : num_slots;
    for (int64_t slot = chunk * chunk_slots; slot < last; ++slot) {
      const int64_t id = ids_S[slot];
      const int64_t row = id < 0 ? -1 : place[id]++;
      row_of_slot_S[slot] = row;
      if (row >= 0) slot_of_row_N[row] = slot;
    }
  }
}

}  // namespace cpu
}  // namespace samoe

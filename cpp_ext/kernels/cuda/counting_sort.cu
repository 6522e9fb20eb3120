// The counting sort behind a permutation: a warp counts and places the slots of one chunk, 32 at a time and in order.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

constexpr int64_t kChunkSlots = 256;   // few, so that a chunk's steps, each waiting for the one before, are few
constexpr int64_t kMaxChunks = 1024;  // the scan passes over all chunks' counters one after another

struct Chunk {
  int64_t first, last;
  int64_t* counters_E;
};

SAMOE_DEVICE Chunk chunk_of_warp(int64_t num_slots, int64_t num_chunks, int64_t num_experts, int64_t* cursor) {
  const int64_t chunk = global_warp(), size = (num_slots + num_chunks - 1) / num_chunks;
  const int64_t first = chunk * size, last = first + size < num_slots ? first + size : num_slots;
  return {first, last, cursor + chunk * num_experts};
}

// Lanes of the same expert as this one.
SAMOE_DEVICE unsigned same_expert(int64_t id) { return __match_any_sync(kAllLanes, static_cast<int>(id)); }
SAMOE_DEVICE int lanes_before(unsigned lanes) { return __popc(lanes & ((1u << lane_of_thread()) - 1u)); }

__global__ void count_chunks(const int64_t* ids_S, int64_t num_slots, int64_t num_chunks, int64_t num_experts,
                             int64_t* cursor, unsigned long long* first_bad) {
  if (global_warp() >= num_chunks) return;
  const Chunk chunk = chunk_of_warp(num_slots, num_chunks, num_experts, cursor);
  for (int64_t e = lane_of_thread(); e < num_experts; e += kWarp) chunk.counters_E[e] = 0;
  __syncwarp();
  for (int64_t start = chunk.first; start < chunk.last; start += kWarp) {
    const int64_t slot = start + lane_of_thread();
    int64_t id = slot < chunk.last ? ids_S[slot] : -1;
    if (id < -1 || id >= num_experts) {
      atomicMin(first_bad, static_cast<unsigned long long>(slot));
      id = -1;
    }
    const unsigned same = same_expert(id);
    if (id >= 0 && lanes_before(same) == 0) chunk.counters_E[id] += __popc(same);
    __syncwarp();
  }
}

// One block: counts become the places where each chunk starts to write, experts in order, inside an expert chunks.
__global__ void scan_counts(int64_t num_chunks, int64_t num_experts, int64_t* cursor, int64_t* counts_E,
                            int64_t* num_kept) {
  __shared__ int64_t ends[kThreads];
  int64_t before = 0;  // kept slots of the experts of earlier rounds
  for (int64_t first = 0; first < num_experts; first += kThreads) {
    const int64_t e = first + threadIdx.x;
    int64_t count = 0;
    if (e < num_experts) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) count += cursor[chunk * num_experts + e];
      counts_E[e] = count;
    }
    ends[threadIdx.x] = count;
    __syncthreads();
    for (unsigned step = 1; step < kThreads; step *= 2) {
      const int64_t earlier = threadIdx.x >= step ? ends[threadIdx.x - step] : 0;
      __syncthreads();
      ends[threadIdx.x] += earlier;
      __syncthreads();
    }
    int64_t place = before + ends[threadIdx.x] - count;
    if (e < num_experts) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const int64_t of_chunk = cursor[chunk * num_experts + e];
        cursor[chunk * num_experts + e] = place;
        place += of_chunk;
      }
    }
    before += ends[kThreads - 1];
    __syncthreads();
  }
  if (threadIdx.x == 0) *num_kept = before;
}

__global__ void place_chunks(const int64_t* ids_S, int64_t num_slots, int64_t num_chunks, int64_t num_experts,
                             int64_t* cursor, int64_t* slot_of_row_N, int64_t* row_of_slot_S) {
  if (global_warp() >= num_chunks) return;
  const Chunk chunk = chunk_of_warp(num_slots, num_chunks, num_experts, cursor);
  for (int64_t start = chunk.first; start < chunk.last; start += kWarp) {
    const int64_t slot = start + lane_of_thread();
    const int64_t id = slot < chunk.last ? ids_S[slot] : -1;
    const unsigned same = same_expert(id);
    const int earlier = lanes_before(same);
    const int64_t row = id < 0 ? -1 : chunk.counters_E[id] + earlier;
    __syncwarp();
    if (id >= 0 && earlier == 0) chunk.counters_E[id] += __popc(same);
    __syncwarp();
    if (slot < chunk.last) row_of_slot_S[slot] = row;
    if (row >= 0) slot_of_row_N[row] = slot;
  }
}

}  // namespace

int64_t num_slot_chunks(int64_t num_slots) {
  const int64_t chunks = ceil_div(num_slots, kChunkSlots);
  return chunks < 1 ? 1 : (chunks < kMaxChunks ? chunks : kMaxChunks);
}

void count_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t* counts_E, int64_t* cursor,
                 int64_t* state, cudaStream_t stream) {
  const int64_t chunks = num_slot_chunks(num_slots);
  cudaMemsetAsync(state, 0xff, 2 * sizeof(int64_t), stream);
  launch(count_chunks, ceil_div(chunks, kWarps), stream, ids_S, num_slots, chunks, num_experts, cursor,
         reinterpret_cast<unsigned long long*>(state + 1));
  launch(scan_counts, 1, stream, chunks, num_experts, cursor, counts_E, state);
}

void place_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t* cursor, int64_t* slot_of_row_N,
                 int64_t* row_of_slot_S, cudaStream_t stream) {
  const int64_t chunks = num_slot_chunks(num_slots);
  launch(place_chunks, ceil_div(chunks, kWarps), stream, ids_S, num_slots, chunks, num_experts, cursor, slot_of_row_N,
         row_of_slot_S);
}

}  // namespace cuda
}  // namespace samoe

// The counting sort behind a permutation: a warp counts and places the slots of one chunk, 32 at a time and in order.
// Dropped slots are those of one expert more, the last.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

constexpr int64_t kChunkSlots = 256;   // few, so that a chunk's steps, each waiting for the one before, are few
constexpr int64_t kMaxChunks = 1024;  // the scan of one block passes over all chunks' counters, 32 at a time

struct Chunk {
  int64_t first, last;
  int64_t* counters;  // one a bucket
};

SAMOE_DEVICE Chunk chunk_of_warp(int64_t num_slots, int64_t num_chunks, int64_t num_buckets, int64_t* cursor) {
  const int64_t chunk = global_warp(), size = (num_slots + num_chunks - 1) / num_chunks;
  const int64_t first = chunk * size, last = first + size < num_slots ? first + size : num_slots;
  return {first, last, cursor + chunk * num_buckets};
}

// Lanes of the same expert as this one.
SAMOE_DEVICE unsigned same_expert(int64_t id) { return __match_any_sync(kAllLanes, static_cast<int>(id)); }
SAMOE_DEVICE int lanes_before(unsigned lanes) { return __popc(lanes & ((1u << lane_of_thread()) - 1u)); }

// Slots beyond the last have the bucket -1.
SAMOE_DEVICE int64_t bucket_of(const int64_t* ids_S, int64_t slot, const Chunk& chunk, int64_t num_experts) {
  if (slot >= chunk.last) return -1;
  const int64_t id = ids_S[slot];
  assert(id >= -1 && id < num_experts);
  return id < 0 ? num_experts : id;
}

__global__ void count_chunks(const int64_t* ids_S, int64_t num_slots, int64_t num_chunks, int64_t num_experts,
                             int64_t* cursor) {
  if (global_warp() >= num_chunks) return;
  const Chunk chunk = chunk_of_warp(num_slots, num_chunks, num_experts + 1, cursor);
  for (int64_t e = lane_of_thread(); e <= num_experts; e += kWarp) chunk.counters[e] = 0;
  __syncwarp();
  for (int64_t start = chunk.first; start < chunk.last; start += kWarp) {
    const int64_t bucket = bucket_of(ids_S, start + lane_of_thread(), chunk, num_experts);
    const unsigned same = same_expert(bucket);
    if (bucket >= 0 && lanes_before(same) == 0) chunk.counters[bucket] += __popc(same);
    __syncwarp();
  }
}

// The sum of the lanes before this one; `total` becomes that of all.
SAMOE_DEVICE int64_t sum_before(int64_t value, int64_t& total) {
  int64_t before = 0;
  total = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, total, step);
    if ((lane_of_thread() & step) != 0) before += other;
    total += other;
  }
  return before;
}

// One block: counts become the places where each chunk starts to write, experts in order, inside an expert chunks. An
// expert's rows end at `ends`; the last one's are followed by those of dropped slots, which count as its own there. A warp
// takes an expert, a lane every 32nd chunk.
__global__ void scan_counts(int64_t num_slots, int64_t num_chunks, int64_t num_experts, int64_t* cursor, int64_t* counts_E,
                            int32_t* ends_E) {
  const int64_t num_buckets = num_experts + 1;
  const int lane = lane_of_thread();
  for (int64_t e = warp_of_thread(); e < num_experts; e += kWarps) {
    int64_t count = 0;
    for (int64_t chunk = lane; chunk < num_chunks; chunk += kWarp) count += cursor[chunk * num_buckets + e];
    count = warp_sum(count);
    if (lane == 0) counts_E[e] = count;
  }
  __syncthreads();
  for (int64_t e = warp_of_thread(); e < num_buckets; e += kWarps) {
    int64_t place = 0;
    for (int64_t earlier = lane; earlier < e; earlier += kWarp) place += counts_E[earlier];
    place = warp_sum(place);
    if (lane == 0 && e < num_experts) ends_E[e] = static_cast<int32_t>(e == num_experts - 1 ? num_slots : place + counts_E[e]);
    for (int64_t first = 0; first < num_chunks; first += kWarp) {
      const int64_t chunk = first + lane;
      int64_t total = 0;
      const int64_t of_chunk = chunk < num_chunks ? cursor[chunk * num_buckets + e] : 0;
      const int64_t before = sum_before(of_chunk, total);
      if (chunk < num_chunks) cursor[chunk * num_buckets + e] = place + before;
      place += total;
    }
  }
}

__global__ void place_chunks(const int64_t* ids_S, int64_t num_slots, int64_t num_chunks, int64_t num_experts,
                             int64_t* cursor, int64_t* slot_of_row_S, int64_t* row_of_slot_S) {
  if (global_warp() >= num_chunks) return;
  const Chunk chunk = chunk_of_warp(num_slots, num_chunks, num_experts + 1, cursor);
  for (int64_t start = chunk.first; start < chunk.last; start += kWarp) {
    const int64_t slot = start + lane_of_thread();
    const int64_t bucket = bucket_of(ids_S, slot, chunk, num_experts);
    const unsigned same = same_expert(bucket);
    const int earlier = lanes_before(same);
    const int64_t row = bucket < 0 ? -1 : chunk.counters[bucket] + earlier;
    __syncwarp();
    if (bucket >= 0 && earlier == 0) chunk.counters[bucket] += __popc(same);
    __syncwarp();
    if (row < 0) continue;
    slot_of_row_S[row] = slot;
    row_of_slot_S[slot] = bucket == num_experts ? -1 : row;
  }
}

}  // namespace

int64_t num_slot_chunks(int64_t num_slots) {
  const int64_t chunks = ceil_div(num_slots, kChunkSlots);
  return chunks < 1 ? 1 : (chunks < kMaxChunks ? chunks : kMaxChunks);
}

void count_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t* counts_E, int32_t* ends_E,
                 int64_t* cursor, cudaStream_t stream) {
  const int64_t chunks = num_slot_chunks(num_slots);
  launch(count_chunks, ceil_div(chunks, kWarps), stream, ids_S, num_slots, chunks, num_experts, cursor);
  launch(scan_counts, 1, stream, num_slots, chunks, num_experts, cursor, counts_E, ends_E);
}

void place_slots(const int64_t* ids_S, int64_t num_slots, int64_t num_experts, int64_t* cursor, int64_t* slot_of_row_S,
                 int64_t* row_of_slot_S, cudaStream_t stream) {
  const int64_t chunks = num_slot_chunks(num_slots);
  launch(place_chunks, ceil_div(chunks, kWarps), stream, ids_S, num_slots, chunks, num_experts, cursor, slot_of_row_S,
         row_of_slot_S);
}

}  // namespace cuda
}  // namespace samoe

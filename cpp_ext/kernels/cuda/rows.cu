// Rows to experts and back: one warp a row or token, each output row written once.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

template <typename Unit>
__global__ void gather_rows_kernel(cpu::GatherRows a, int64_t num_sources) {
  const int64_t row = global_warp();
  if (row >= a.num_rows) return;
  const int64_t source = a.index_N[row] / a.divisor;
  assert(a.index_N[row] >= 0 && source < num_sources);
  const Unit* from = reinterpret_cast<const Unit*>(a.x + source * a.row_bytes);
  Unit* to = reinterpret_cast<Unit*>(a.out + row * a.row_bytes);
  const int64_t num_units = a.row_bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t i = lane_of_thread(); i < num_units; i += kWarp) to[i] = from[i];
}

template <typename T, int V>
__global__ void unpermute_kernel(cpu::Unpermute a, int64_t num_rows) {
  const int64_t t = global_warp();
  if (t >= a.num_tokens) return;
  const T* rows = static_cast<const T*>(a.rows_NH);
  T* y = static_cast<T*>(a.y_TH) + t * a.hidden;
  for (int64_t h = lane_of_thread() * V; h < a.hidden; h += kWarp * V) {
    float sum[V] = {};
    for (int64_t slot = t * a.topk; slot < (t + 1) * a.topk; ++slot) {
      const int64_t row = a.row_of_slot_TK[slot];
      assert(row >= -1 && row < num_rows);
      if (row < 0) continue;
      const float weight = a.probs_TK == nullptr ? 1.0f : a.probs_TK[slot];
      const Pack<T, V> x = load<V>(rows + row * a.hidden + h);
      for (int v = 0; v < V; ++v) sum[v] += weight * to_float(x.at[v]);
    }
    Pack<T, V> out;
    for (int v = 0; v < V; ++v) out.at[v] = from_float<T>(sum[v]);
    store<V>(y + h, out);
  }
}

// A warp a slot: drow = prob * dy and dprob = <dy, row>. The warp with the number of a dropped slot's row clears that.
template <typename T, int V>
__global__ void unpermute_backward_kernel(cpu::UnpermuteBackward a, int64_t num_rows) {
  const int64_t slot = global_warp();
  if (slot >= a.num_tokens * a.topk) return;
  const int64_t row = a.row_of_slot_TK[slot];
  assert(row >= -1 && row < num_rows);
  const int64_t slot_of_row = slot < num_rows ? a.slot_of_row_N[slot] : 0;
  assert(slot_of_row >= 0 && slot_of_row < a.num_tokens * a.topk);
  if (slot < num_rows && a.row_of_slot_TK[slot_of_row] < 0) {
    T* dx = static_cast<T*>(a.drows_NH) + slot * a.hidden;
    for (int64_t h = lane_of_thread(); h < a.hidden; h += kWarp) dx[h] = T{};
  }
  float dot = 0.0f;
  if (row >= 0) {
    const T* dy = static_cast<const T*>(a.dy_TH) + slot / a.topk * a.hidden;
    const T* x = static_cast<const T*>(a.rows_NH) + row * a.hidden;
    T* dx = static_cast<T*>(a.drows_NH) + row * a.hidden;
    const float weight = a.probs_TK[slot];
    for (int64_t h = lane_of_thread() * V; h < a.hidden; h += kWarp * V) {
      const Pack<T, V> gradient = load<V>(dy + h), value = load<V>(x + h);
      Pack<T, V> out;
      for (int v = 0; v < V; ++v) {
        dot += to_float(gradient.at[v]) * to_float(value.at[v]);
        out.at[v] = from_float<T>(weight * to_float(gradient.at[v]));
      }
      store<V>(dx + h, out);
    }
  }
  dot = warp_sum(dot);
  if (lane_of_thread() == 0) a.dprobs_TK[slot] = dot;
}

template <typename T>
void unpermute_typed(const cpu::Unpermute& a, int64_t num_rows, cudaStream_t stream) {
  const bool wide = is_wide<T>(a.hidden, a.rows_NH, a.y_TH);
  launch(wide ? unpermute_kernel<T, kWide<T>> : unpermute_kernel<T, 1>, ceil_div(a.num_tokens, kWarps), stream, a,
         num_rows);
}

template <typename T>
void unpermute_backward_typed(const cpu::UnpermuteBackward& a, int64_t num_rows, cudaStream_t stream) {
  const bool wide = is_wide<T>(a.hidden, a.dy_TH, a.rows_NH, a.drows_NH);
  launch(wide ? unpermute_backward_kernel<T, kWide<T>> : unpermute_backward_kernel<T, 1>,
         ceil_div(a.num_tokens * a.topk, kWarps), stream, a, num_rows);
}

}  // namespace

void gather_rows(const cpu::GatherRows& a, int64_t num_sources, cudaStream_t stream) {
  const bool wide = is_wide<char>(a.row_bytes, a.x, a.out);
  launch(wide ? gather_rows_kernel<Pack<uint32_t, 4>> : gather_rows_kernel<uint16_t>, ceil_div(a.num_rows, kWarps), stream,
         a, num_sources);
}

void unpermute(const cpu::Unpermute& a, int64_t num_rows, cudaStream_t stream) {
  (a.dtype == DType::f32 ? unpermute_typed<float> : unpermute_typed<uint16_t>)(a, num_rows, stream);
}

void unpermute_backward(const cpu::UnpermuteBackward& a, int64_t num_rows, cudaStream_t stream) {
  (a.dtype == DType::f32 ? unpermute_backward_typed<float> : unpermute_backward_typed<uint16_t>)(a, num_rows, stream);
}

}  // namespace cuda
}  // namespace samoe

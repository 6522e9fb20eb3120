// SwiGLU and its gradient: a thread has some columns of a row, of the gate and of what it gates; each element is read and
// written once.
#include "device.cuh"

namespace samoe {
namespace cuda {
namespace {

// A place among R x F activations, V of them at once, and the gate's place in [R, 2 F].
struct Place {
  int64_t activation, gate;
};

template <int V>
SAMOE_DEVICE bool place_of_thread(int64_t num_rows, int64_t width, Place& place) {
  place.activation = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (place.activation >= num_rows * width) return false;
  const int64_t row = place.activation / width;
  place.gate = place.activation + row * width;
  return true;
}

template <typename T, int V>
__global__ void swiglu_kernel(cpu::Activate a) {
  Place at;
  if (!place_of_thread<V>(a.num_rows, a.width, at)) return;
  const T* h = static_cast<const T*>(a.h_nU);
  const Pack<T, V> gate = load<V>(h + at.gate), up = load<V>(h + at.gate + a.width);
  Pack<T, V> out;
  for (int v = 0; v < V; ++v) {
    const float x = to_float(gate.at[v]);
    out.at[v] = from_float<T>(x / (1.0f + expf(-x)) * to_float(up.at[v]));
  }
  store<V>(static_cast<T*>(a.a_nF) + at.activation, out);
}

template <typename T, int V>
__global__ void swiglu_backward_kernel(cpu::ActivateBackward a) {
  Place at;
  if (!place_of_thread<V>(a.num_rows, a.width, at)) return;
  const T* h = static_cast<const T*>(a.h_nU);
  const Pack<T, V> gate = load<V>(h + at.gate), up = load<V>(h + at.gate + a.width);
  const Pack<T, V> da = load<V>(static_cast<const T*>(a.da_nF) + at.activation);
  Pack<T, V> activation, dgate, dup;
  for (int v = 0; v < V; ++v) {
    const float x = to_float(gate.at[v]), y = to_float(up.at[v]), d = to_float(da.at[v]);
    const float share = 1.0f / (1.0f + expf(-x)), silu = x * share;
    activation.at[v] = from_float<T>(silu * y);
    dup.at[v] = from_float<T>(d * silu);
    dgate.at[v] = from_float<T>(d * y * share * (1.0f + x * (1.0f - share)));
  }
  T* dh = static_cast<T*>(a.dh_nU);
  store<V>(static_cast<T*>(a.a_nF) + at.activation, activation);
  store<V>(dh + at.gate, dgate);
  store<V>(dh + at.gate + a.width, dup);
}

template <typename T>
void swiglu_typed(const cpu::Activate& a, cudaStream_t stream) {
  const bool wide = is_wide<T>(a.width, a.h_nU, a.a_nF);
  launch(wide ? swiglu_kernel<T, kWide<T>> : swiglu_kernel<T, 1>,
         ceil_div(a.num_rows * a.width, kThreads * (wide ? kWide<T> : 1)), stream, a);
}

template <typename T>
void swiglu_backward_typed(const cpu::ActivateBackward& a, cudaStream_t stream) {
  const bool wide = is_wide<T>(a.width, a.h_nU, a.da_nF, a.a_nF, a.dh_nU);
  launch(wide ? swiglu_backward_kernel<T, kWide<T>> : swiglu_backward_kernel<T, 1>,
         ceil_div(a.num_rows * a.width, kThreads * (wide ? kWide<T> : 1)), stream, a);
}

}  // namespace

void swiglu(const cpu::Activate& a, cudaStream_t stream) {
  (a.h_dtype == DType::f32 ? swiglu_typed<float> : swiglu_typed<uint16_t>)(a, stream);
}

void swiglu_backward(const cpu::ActivateBackward& a, cudaStream_t stream) {
  (a.h_dtype == DType::f32 ? swiglu_backward_typed<float> : swiglu_backward_typed<uint16_t>)(a, stream);
}

}  // namespace cuda
}  // namespace samoe

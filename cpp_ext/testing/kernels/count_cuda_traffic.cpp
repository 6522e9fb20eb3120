// A program without torch and without a GPU that says what the CUDA kernels launch, read and write: their own source runs
// through cuda_emulation.h, over access_counts.h. Prints one line of JSON for each case, for a test with limits.
#include <cstdio>
#include <string>
#include <vector>

#include "../../kernels/cuda/launchers.h"
#include "../../kernels/kernels.h"
#include "../stand_ins/access_counts.h"
#include "../stand_ins/cuda_emulation.h"
#include "checks.h"

namespace {

using samoe::DType;
using samoe::access::Kind;
using samoe::access::watched;
namespace cuda = samoe::cuda;

constexpr cudaStream_t kStream = nullptr;

template <typename T>
std::vector<T> numbers(int64_t n, Kind kind = Kind::data) {
  std::vector<T> values;
  for (const float x : samoe::floats(n)) values.push_back(sizeof(T) == 4 ? static_cast<T>(x) : static_cast<T>(samoe::high_half(x)));
  return watched(std::move(values), kind);
}

template <typename T>
std::vector<T> room(int64_t n) {
  return watched(std::vector<T>(static_cast<size_t>(n)));
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::bf16;
}

// Runs an op and says what it did. ideal_read, ideal_written: bytes of its operands and its results, each once.
template <typename Op>
void report(const std::string& what, int64_t ideal_read, int64_t ideal_written, const Op& op) {
  samoe::emulation::num_launches = 0;
  op();
  const auto counts = samoe::access::take();
  std::printf("{\"what\": \"%s\", \"launches\": %lld, \"read\": %lld, \"written\": %lld, \"touched_read\": %lld, "
              "\"touched_written\": %lld, \"ideal_read\": %lld, \"ideal_written\": %lld}\n",
              what.c_str(), static_cast<long long>(samoe::emulation::num_launches), static_cast<long long>(counts.read),
              static_cast<long long>(counts.written), static_cast<long long>(counts.touched_read),
              static_cast<long long>(counts.touched_written), static_cast<long long>(ideal_read),
              static_cast<long long>(ideal_written));
}

void count_combine(int64_t layers, int64_t banks, int64_t n) {
  const std::string size = std::to_string(layers) + " layers, " + std::to_string(banks) + " banks";
  const int64_t bank_bytes = banks * n * 4, a_bytes = layers * banks * 4;
  {
    const auto a = numbers<float>(layers * banks, Kind::table), t = numbers<float>(banks * n);
    auto w = room<uint16_t>(layers * n);
    report("combine, " + size, a_bytes + bank_bytes, layers * n * 2, [&] {
      cuda::combine({a.data(), {t.data(), n, n}, DType::bf16, {reinterpret_cast<char*>(w.data()), n * 2, n * 2}, layers, 1, banks, n, 1},
                    kStream);
    });
  }
  const auto a = numbers<float>(layers * banks, Kind::table), t = numbers<float>(banks * n), dw = numbers<float>(layers * n);
  auto dt = numbers<float>(banks * n), da = room<float>(layers * banks);
  const samoe::cpu::CombineBackward c = {a.data(), {t.data(), n, n}, {dw.data(), n, n}, {dt.data(), n, n}, da.data(), layers, 1, banks, n, 1};
  auto workspace = room<char>(cuda::combine_backward_workspace_bytes(c));
  report("combine backward, " + size, a_bytes + 2 * bank_bytes + layers * n * 4, bank_bytes + a_bytes,
         [&] { cuda::combine_backward(c, workspace.data(), kStream); });
}

// tokens * topk slots in a random order of experts.
struct Order {
  std::vector<int64_t> ids, slot_of_row, row_of_slot;
};

Order count_sort(int64_t tokens, int64_t topk, int64_t experts) {
  const int64_t slots = tokens * topk;
  std::vector<int64_t> chosen(static_cast<size_t>(slots));
  for (int64_t& id : chosen) id = samoe::pick(0, experts - 1);
  Order order{watched(chosen), room<int64_t>(slots), room<int64_t>(slots)};
  auto counts = room<int64_t>(experts), cursors = room<int64_t>(cuda::num_slot_chunks(slots) * (experts + 1));
  auto ends = room<int32_t>(experts);
  report("sort", slots * 8, 2 * slots * 8 + experts * 12, [&] {
    cuda::count_slots(order.ids.data(), slots, experts, counts.data(), ends.data(), cursors.data(), kStream);
    cuda::place_slots(order.ids.data(), slots, experts, cursors.data(), order.slot_of_row.data(), order.row_of_slot.data(), kStream);
  });
  return order;
}

template <typename T>
void count_rows(const Order& order, int64_t tokens, int64_t topk, int64_t hidden) {
  const int64_t slots = tokens * topk, size = static_cast<int64_t>(sizeof(T));
  const std::string type = sizeof(T) == 4 ? ", fp32" : ", bf16";
  const int64_t row_bytes = hidden * size, rows_bytes = slots * row_bytes, tokens_bytes = tokens * row_bytes, index_bytes = slots * 8;
  {
    const auto x = numbers<T>(tokens * hidden);
    const auto slot_of_row = watched(order.slot_of_row, Kind::table);
    auto out = room<T>(slots * hidden);
    report("permute" + type, tokens_bytes + index_bytes, rows_bytes, [&] {
      cuda::gather_rows({reinterpret_cast<const char*>(x.data()), slot_of_row.data(), slots, topk, row_bytes,
                         reinterpret_cast<char*>(out.data()), 1}, tokens, kStream);
    });
  }
  {
    const auto rows = numbers<T>(slots * hidden);
    const auto probs = numbers<float>(slots, Kind::table);
    const auto row_of_slot = watched(order.row_of_slot, Kind::table);
    auto y = room<T>(tokens * hidden);
    report("unpermute" + type, rows_bytes + index_bytes + slots * 4, tokens_bytes, [&] {
      cuda::unpermute({dtype_of<T>(), rows.data(), probs.data(), row_of_slot.data(), tokens, topk, hidden, y.data(), 1}, slots, kStream);
    });
  }
  const auto dy = numbers<T>(tokens * hidden), rows = numbers<T>(slots * hidden);
  const auto probs = numbers<float>(slots, Kind::table);
  const auto slot_of_row = watched(order.slot_of_row, Kind::table), row_of_slot = watched(order.row_of_slot, Kind::table);
  auto drows = room<T>(slots * hidden);
  auto dprobs = room<float>(slots);
  report("unpermute backward" + type, tokens_bytes + rows_bytes + 2 * index_bytes + slots * 4, rows_bytes + slots * 4, [&] {
    cuda::unpermute_backward({dtype_of<T>(), dy.data(), rows.data(), probs.data(), slot_of_row.data(), row_of_slot.data(), tokens, topk,
                              hidden, drows.data(), dprobs.data(), 1}, slots, kStream);
  });
}

void count_gate(int64_t tokens, int64_t experts, int64_t topk, int64_t groups) {
  const int64_t logits_bytes = tokens * experts * 4, slots = tokens * topk;
  auto logits = numbers<float>(tokens * experts), probs = room<float>(slots), sums = room<float>(groups * experts), z = room<float>(1),
       logsumexp = room<float>(tokens);
  auto ids = room<int64_t>(slots), counts = room<int64_t>(groups * experts);
  const samoe::cpu::GateForward a = {logits.data(), tokens, experts, topk, groups, false, false, probs.data(), ids.data(),
                                     counts.data(), sums.data(), z.data(), logsumexp.data(), 1};
  auto workspace = room<char>(cuda::gate_workspace_bytes(a));
  report("gate", logits_bytes, slots * 12 + groups * experts * 12 + 4 + tokens * 4, [&] { cuda::gate_forward(a, workspace.data(), kStream); });
  const auto again = watched(logits), dprobs = numbers<float>(slots), dsums = numbers<float>(groups * experts, Kind::table), dz = numbers<float>(1, Kind::table);
  const auto kept = watched(logsumexp, Kind::table), weights = watched(probs, Kind::table);
  const auto chosen = watched(ids, Kind::table);
  auto gradient = room<float>(tokens * experts);
  report("gate backward", logits_bytes + slots * 16 + groups * experts * 4 + tokens * 4 + 4, logits_bytes, [&] {
    cuda::gate_backward({again.data(), kept.data(), weights.data(), chosen.data(), dprobs.data(), dsums.data(), dz.data(), tokens, experts,
                         topk, groups, false, false, gradient.data(), 1}, kStream);
  });
}

template <typename T>
void count_swiglu(int64_t rows, int64_t width) {
  const int64_t bytes = rows * width * static_cast<int64_t>(sizeof(T));
  constexpr DType kType = dtype_of<T>();
  {
    const auto h = numbers<T>(rows * width * 2);
    auto a = room<T>(rows * width);
    report("swiglu", 2 * bytes, bytes, [&] { cuda::swiglu({kType, kType, h.data(), nullptr, rows, width, true, nullptr, a.data()}, kStream); });
  }
  const auto h = numbers<T>(rows * width * 2), da = numbers<T>(rows * width);
  auto a = room<T>(rows * width), dh = room<T>(rows * width * 2);
  report("swiglu backward", 3 * bytes, 3 * bytes, [&] {
    cuda::swiglu_backward({kType, kType, h.data(), nullptr, da.data(), rows, width, true, a.data(), dh.data()}, kStream);
  });
}

}  // namespace

int main() {
  count_combine(8, 4, 8192);
  count_combine(24, 6, 8192);
  count_gate(256, 32, 2, 2);
  const Order order = count_sort(256, 2, 32);
  count_rows<uint16_t>(order, 256, 2, 256);
  count_rows<float>(order, 256, 2, 256);
  count_swiglu<uint16_t>(64, 256);
  return 0;
}

// CPU implementations of the routing and pool ops: checks, allocation, launch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../kernels/kernels.h"

namespace {

using at::Tensor;

// A thread must have this much to do before waking it pays.
constexpr int64_t kBytesPerThread = 64 << 10;

int threads_for(int64_t bytes) {
  const int64_t useful = bytes / kBytesPerThread;
  const int64_t allowed = at::get_num_threads();
  return static_cast<int>(useful < 1 ? 1 : (useful < allowed ? useful : allowed));
}

samoe::DType dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat ? samoe::DType::f32 : samoe::DType::bf16;
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate(const Tensor& logits, int64_t topk, bool sigmoid,
                                                                     bool pre_softmax, int64_t num_groups) {
  samoe::check_contiguous(logits, "logits", 2, at::kFloat);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  TORCH_CHECK_VALUE(topk >= 1 && topk <= num_experts, "topk = ", topk, ": from 1 to ", num_experts);
  TORCH_CHECK_VALUE(num_experts < INT32_MAX, "too many experts: ", num_experts);
  TORCH_CHECK_VALUE(num_groups >= 1 && num_tokens % num_groups == 0, "num_groups = ", num_groups,
                    ": a divisor of the number of tokens, ", num_tokens);
  const auto f32 = logits.options();
  const auto i64 = f32.dtype(at::kLong);
  Tensor probs = at::empty({num_tokens, topk}, f32), ids = at::empty({num_tokens, topk}, i64);
  Tensor counts = at::empty({num_groups, num_experts}, i64), score_sum = at::empty({num_groups, num_experts}, f32);
  Tensor z_sum = at::empty({}, f32), logsumexp = at::empty({num_tokens}, f32);
  samoe::cpu::kernels().gate_forward({logits.const_data_ptr<float>(), num_tokens, num_experts, topk, num_groups,
                                      sigmoid, pre_softmax, probs.mutable_data_ptr<float>(),
                                      ids.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int64_t>(),
                                      score_sum.mutable_data_ptr<float>(), z_sum.mutable_data_ptr<float>(),
                                      logsumexp.mutable_data_ptr<float>(), threads_for(logits.numel() * 8)});
  return {probs, ids, counts, score_sum, z_sum, logsumexp};
}

Tensor topk_gate_backward(const Tensor& logits, const Tensor& logsumexp, const Tensor& probs, const Tensor& ids,
                          const std::optional<Tensor>& dprobs, const std::optional<Tensor>& dscore_sum,
                          const std::optional<Tensor>& dz, bool sigmoid, bool pre_softmax, int64_t num_groups) {
  samoe::check_contiguous(logits, "logits", 2, at::kFloat);
  samoe::check_contiguous(logsumexp, "logsumexp", 1, at::kFloat);
  samoe::check_contiguous(probs, "probs", 2, at::kFloat);
  samoe::check_contiguous(ids, "ids", 2, at::kLong);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  TORCH_CHECK_VALUE(num_groups >= 1 && num_tokens % num_groups == 0, "num_groups = ", num_groups);
  TORCH_CHECK_VALUE(logsumexp.size(0) == num_tokens && probs.size(0) == num_tokens && ids.sizes() == probs.sizes(),
                    "the saved tensors do not belong to these logits");
  if (dprobs.has_value()) {
    samoe::check_contiguous(*dprobs, "dprobs", 2, at::kFloat);
    TORCH_CHECK_VALUE(dprobs->sizes() == probs.sizes(), "dprobs is ", dprobs->sizes(), ", not ", probs.sizes());
  }
  if (dscore_sum.has_value()) {
    samoe::check_contiguous(*dscore_sum, "dscore_sum", 2, at::kFloat);
    TORCH_CHECK_VALUE(dscore_sum->size(0) == num_groups && dscore_sum->size(1) == num_experts, "dscore_sum is ",
                      dscore_sum->sizes());
  }
  if (dz.has_value()) samoe::check_contiguous(*dz, "dz", 0, at::kFloat);
  Tensor dlogits = at::empty(logits.sizes(), logits.options());
  samoe::cpu::kernels().gate_backward(
      {logits.const_data_ptr<float>(), logsumexp.const_data_ptr<float>(), probs.const_data_ptr<float>(),
       ids.const_data_ptr<int64_t>(), data_or_null<float>(dprobs), data_or_null<float>(dscore_sum),
       data_or_null<float>(dz), num_tokens, num_experts, probs.size(1), num_groups, sigmoid, pre_softmax,
       dlogits.mutable_data_ptr<float>(), threads_for(logits.numel() * 8)});
  return dlogits;
}

std::tuple<Tensor, Tensor, Tensor> make_permutation(const Tensor& ids, int64_t num_experts) {
  samoe::check_contiguous(ids, "ids", 2, at::kLong);
  TORCH_CHECK_VALUE(num_experts >= 1, "num_experts = ", num_experts);
  const int64_t num_slots = ids.numel();
  const int64_t* ids_S = ids.const_data_ptr<int64_t>();
  const int64_t chunks = samoe::cpu::num_slot_chunks(num_slots, num_experts, at::get_num_threads());
  const int threads = static_cast<int>(chunks);
  std::vector<int64_t> cursor(static_cast<size_t>(chunks * num_experts));
  Tensor counts = at::empty({num_experts}, ids.options());
  int64_t bad_id = 0;
  const int64_t num_rows = samoe::cpu::count_slots(ids_S, num_slots, num_experts, chunks,
                                                   counts.mutable_data_ptr<int64_t>(), cursor.data(), &bad_id, threads);
  TORCH_CHECK_INDEX(num_rows >= 0, "expert id ", bad_id, "; allowed are -1 to ", num_experts - 1);
  Tensor slot_of_row = at::empty({num_rows}, ids.options()), row_of_slot = at::empty(ids.sizes(), ids.options());
  samoe::cpu::place_slots(ids_S, num_slots, num_experts, chunks, cursor.data(), slot_of_row.mutable_data_ptr<int64_t>(),
                          row_of_slot.mutable_data_ptr<int64_t>(), threads);
  return {slot_of_row, row_of_slot, counts};
}

// Every entry must name a row: a wrong index would read foreign memory.
void check_index(const Tensor& index, const char* name, int64_t low, int64_t high) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  const int64_t num = index.numel();
  bool bad = false;
  for (int64_t i = 0; i < num; ++i) bad |= values[i] < low || values[i] >= high;
  TORCH_CHECK_INDEX(!bad, name, " has an entry outside ", low, " to ", high - 1);
}

Tensor permute(const Tensor& x, const Tensor& slot_of_row, int64_t topk) {
  samoe::check_rows(x, "x");
  samoe::check_contiguous(slot_of_row, "slot_of_row", 1, at::kLong);
  TORCH_CHECK_VALUE(topk >= 1, "topk = ", topk);
  check_index(slot_of_row, "slot_of_row", 0, x.size(0) * topk);
  const int64_t num_rows = slot_of_row.size(0);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor rows = at::empty({num_rows, x.size(1)}, x.options());
  samoe::cpu::kernels().gather_rows(
      {static_cast<const char*>(x.const_data_ptr()), slot_of_row.const_data_ptr<int64_t>(), num_rows, topk, row_bytes,
       static_cast<char*>(rows.mutable_data_ptr()), threads_for(2 * num_rows * row_bytes)});
  return rows;
}

void check_probs(const Tensor& probs, const Tensor& row_of_slot) {
  samoe::check_contiguous(probs, "probs", 2, at::kFloat);
  TORCH_CHECK_VALUE(probs.sizes() == row_of_slot.sizes(), "probs is ", probs.sizes(), ", not ", row_of_slot.sizes());
}

Tensor unpermute(const Tensor& rows, const std::optional<Tensor>& probs, const Tensor& row_of_slot) {
  samoe::check_rows(rows, "rows");
  samoe::check_contiguous(row_of_slot, "row_of_slot", 2, at::kLong);
  if (probs.has_value()) check_probs(*probs, row_of_slot);
  check_index(row_of_slot, "row_of_slot", -1, rows.size(0));
  Tensor y = at::empty({row_of_slot.size(0), rows.size(1)}, rows.options());
  samoe::cpu::kernels().unpermute({dtype_of(rows), rows.const_data_ptr(), data_or_null<float>(probs),
                                   row_of_slot.const_data_ptr<int64_t>(), row_of_slot.size(0), row_of_slot.size(1),
                                   rows.size(1), y.mutable_data_ptr(),
                                   threads_for(static_cast<int64_t>(rows.nbytes() + y.nbytes()))});
  return y;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& dy, const Tensor& rows, const Tensor& probs,
                                              const Tensor& slot_of_row, const Tensor& row_of_slot) {
  samoe::check_rows(rows, "rows");
  samoe::check_contiguous(dy, "dy", 2, rows.scalar_type());
  samoe::check_contiguous(row_of_slot, "row_of_slot", 2, at::kLong);
  check_probs(probs, row_of_slot);
  check_index(row_of_slot, "row_of_slot", -1, rows.size(0));
  TORCH_CHECK_VALUE(dy.size(0) == row_of_slot.size(0) && dy.size(1) == rows.size(1), "dy is ", dy.sizes());
  TORCH_CHECK_VALUE(slot_of_row.numel() == rows.size(0), "slot_of_row has ", slot_of_row.numel(), " rows");
  Tensor drows = at::empty(rows.sizes(), rows.options()), dprobs = at::empty(probs.sizes(), probs.options());
  samoe::cpu::kernels().unpermute_backward({dtype_of(rows), dy.const_data_ptr(), rows.const_data_ptr(),
                                            probs.const_data_ptr<float>(), row_of_slot.const_data_ptr<int64_t>(),
                                            row_of_slot.size(0), row_of_slot.size(1), rows.size(1),
                                            drows.mutable_data_ptr(), dprobs.mutable_data_ptr<float>(),
                                            threads_for(static_cast<int64_t>(2 * rows.nbytes()))});
  return {drows, dprobs};
}

template <typename T>
samoe::cpu::Strided3<T> strided(T* data, const Tensor& tensor, int64_t unit = 1) {
  return {data, tensor.stride(0) * unit, tensor.stride(1) * unit};
}

void check_strided(const Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef sizes) {
  samoe::check_tensor(tensor, name, 3, dtype);
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, name, " is ", tensor.sizes(), ", not ", sizes);
  TORCH_CHECK(tensor.stride(2) == 1 || tensor.size(2) <= 1, name, " is not contiguous in its last dim");
}

void combine_banks(const Tensor& coefficients, const Tensor& banks, const Tensor& out) {
  samoe::check_contiguous(coefficients, "coefficients", 3, at::kFloat);
  const int64_t num_layers = coefficients.size(0), num_groups = coefficients.size(1), num_banks = coefficients.size(2);
  samoe::check_tensor(banks, "banks", 3, at::kFloat);
  const int64_t num_elements = banks.size(2);
  check_strided(banks, "banks", at::kFloat, {num_banks, num_groups, num_elements});
  TORCH_CHECK_TYPE(out.scalar_type() == at::kFloat || out.scalar_type() == at::kBFloat16, "out is ", out.scalar_type());
  check_strided(out, "out", out.scalar_type(), {num_layers, num_groups, num_elements});
  samoe::cpu::kernels().combine(
      {coefficients.const_data_ptr<float>(), strided(banks.const_data_ptr<float>(), banks), dtype_of(out),
       strided(static_cast<char*>(out.mutable_data_ptr()), out, static_cast<int64_t>(out.element_size())), num_layers,
       num_groups, num_banks, num_elements, threads_for((num_layers + num_banks) * num_groups * num_elements * 4)});
}

Tensor combine_banks_backward(const Tensor& coefficients, const Tensor& banks, const Tensor& dweights,
                              const Tensor& dbanks) {
  samoe::check_contiguous(coefficients, "coefficients", 3, at::kFloat);
  const int64_t num_layers = coefficients.size(0), num_groups = coefficients.size(1), num_banks = coefficients.size(2);
  samoe::check_tensor(banks, "banks", 3, at::kFloat);
  const int64_t num_elements = banks.size(2);
  check_strided(banks, "banks", at::kFloat, {num_banks, num_groups, num_elements});
  check_strided(dbanks, "dbanks", at::kFloat, {num_banks, num_groups, num_elements});
  check_strided(dweights, "dweights", at::kFloat, {num_layers, num_groups, num_elements});
  Tensor dcoefficients = at::empty(coefficients.sizes(), coefficients.options());
  samoe::cpu::kernels().combine_backward(
      {coefficients.const_data_ptr<float>(), strided(banks.const_data_ptr<float>(), banks),
       strided(dweights.const_data_ptr<float>(), dweights), strided(dbanks.mutable_data_ptr<float>(), dbanks),
       dcoefficients.mutable_data_ptr<float>(), num_layers, num_groups, num_banks, num_elements,
       threads_for((num_layers + 3 * num_banks) * num_groups * num_elements * 4)});
  return dcoefficients;
}

}  // namespace

TORCH_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  m.impl("topk_gate", topk_gate);
  m.impl("topk_gate_backward", topk_gate_backward);
  m.impl("make_permutation", make_permutation);
  m.impl("permute", permute);
  m.impl("unpermute", unpermute);
  m.impl("unpermute_backward", unpermute_backward);
  m.impl("combine_banks", combine_banks);
  m.impl("combine_banks_backward", combine_banks_backward);
}

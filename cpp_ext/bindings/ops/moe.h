// The routing and pool ops for every backend (cpu_backend.h, cuda_backend.h): checks, allocation, launch.
#pragma once

#include <algorithm>
#include <tuple>

#include "../check.h"
#include "../arguments.h"

namespace samoe {
namespace ops {

// Tokens in groups, each with its counts of the experts.
inline void check_groups(const Tensor& logits, int64_t num_groups) {
  const int64_t num_tokens = logits.size(0);
  SAMOE_CHECK(num_groups >= 1 && num_tokens % num_groups == 0, "num_groups = ", num_groups,
                    ": a divisor of the number of tokens, ", num_tokens);
  check_range(product({num_groups, logits.size(1)}), "num_groups x experts", 0, std::max(logits.numel(), kMostCounts));
}

template <typename B>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> topk_gate(const Tensor& logits, int64_t topk, bool sigmoid,
                                                                     bool pre_softmax, int64_t num_groups,
                                                                     const MaybeTensor& key) {
  const B backend(logits, "logits");
  backend.check_contiguous(logits, "logits", 2, kFloat);
  if (key.has_value()) {
    backend.check_contiguous(*key, "key", 2, kFloat);
    SAMOE_CHECK(key->sizes().equals(logits.sizes()), "key ", key->sizes(), " and logits ", logits.sizes(), " differ");
  }
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  check_range(topk, "topk", 1, num_experts);
  SAMOE_CHECK(num_experts < INT32_MAX, "too many experts: ", num_experts);
  check_groups(logits, num_groups);
  Tensor probs = uninitialized({num_tokens, topk}, logits), ids = uninitialized({num_tokens, topk}, logits, kLong);
  Tensor counts = uninitialized({num_groups, num_experts}, logits, kLong), score_sum = uninitialized({num_groups, num_experts}, logits);
  Tensor z_sum = uninitialized({}, logits), logsumexp = uninitialized({num_tokens}, logits);
  backend.gate_forward({logits.const_data_ptr<float>(), num_tokens, num_experts, topk, num_groups, sigmoid, pre_softmax,
                        probs.mutable_data_ptr<float>(), ids.mutable_data_ptr<int64_t>(),
                        counts.mutable_data_ptr<int64_t>(), score_sum.mutable_data_ptr<float>(),
                        z_sum.mutable_data_ptr<float>(), logsumexp.mutable_data_ptr<float>(),
                        backend.threads(logits.numel() * 8), data_or_null<float>(key)});
  return {probs, ids, counts, score_sum, z_sum, logsumexp};
}

template <typename B>
Tensor topk_gate_backward(const Tensor& logits, const Tensor& logsumexp, const Tensor& probs, const Tensor& ids,
                          const MaybeTensor& dprobs, const MaybeTensor& dscore_sum,
                          const MaybeTensor& dz, bool sigmoid, bool pre_softmax, int64_t num_groups) {
  const B backend(logits, "logits");
  backend.check_contiguous(logits, "logits", 2, kFloat);
  backend.check_contiguous(logsumexp, "logsumexp", 1, kFloat);
  backend.check_contiguous(probs, "probs", 2, kFloat);
  backend.check_contiguous(ids, "ids", 2, kLong);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  check_groups(logits, num_groups);
  SAMOE_CHECK(logsumexp.size(0) == num_tokens && probs.size(0) == num_tokens && ids.sizes().equals(probs.sizes()),
                    "the saved tensors do not belong to these logits");
  backend.check_index(ids, "ids", 0, num_experts);
  backend.check_sizes(dprobs, "dprobs", probs.sizes(), kFloat);
  backend.check_sizes(dscore_sum, "dscore_sum", {num_groups, num_experts}, kFloat);
  backend.check_sizes(dz, "dz", {}, kFloat);
  Tensor dlogits = uninitialized(logits.sizes(), logits);
  backend.gate_backward(
      {logits.const_data_ptr<float>(), logsumexp.const_data_ptr<float>(), probs.const_data_ptr<float>(),
       ids.const_data_ptr<int64_t>(), data_or_null<float>(dprobs), data_or_null<float>(dscore_sum),
       data_or_null<float>(dz), num_tokens, num_experts, probs.size(1), num_groups, sigmoid, pre_softmax,
       dlogits.mutable_data_ptr<float>(), backend.threads(logits.numel() * 8)});
  return dlogits;
}

template <typename B>
std::tuple<Tensor, Tensor, Tensor, Tensor> make_permutation(const Tensor& ids, int64_t num_experts) {
  const B backend(ids, "ids");
  backend.check_contiguous(ids, "ids", 2, kLong);
  check_range(num_experts, "num_experts", 1, kMostCounts);
  SAMOE_CHECK(ids.numel() < INT32_MAX, "too many slots: ", ids.numel());
  const Tensor counts = uninitialized({num_experts}, ids), ends = uninitialized({num_experts}, ids, kInt);
  const CountedSlots slots = backend.count_slots(ids, counts, ends);
  SAMOE_CHECK(slots.num_rows >= 0, "expert id ", slots.bad_id, "; allowed are -1 to ", num_experts - 1);
  Tensor slot_of_row = uninitialized({slots.num_rows}, ids), row_of_slot = uninitialized(ids.sizes(), ids);
  backend.place_slots(ids, slots, slot_of_row, row_of_slot);
  return {slot_of_row, row_of_slot, counts, ends};
}

template <typename B>
Tensor permute(const Tensor& x, const Tensor& slot_of_row, int64_t topk) {
  const B backend(x, "x");
  backend.check_rows(x, "x");
  backend.check_contiguous(slot_of_row, "slot_of_row", 1, kLong);
  SAMOE_CHECK(topk >= 1, "topk = ", topk);
  backend.check_index(slot_of_row, "slot_of_row", 0, product({x.size(0), topk}));
  const int64_t num_rows = slot_of_row.size(0);
  const int64_t row_bytes = x.size(1) * static_cast<int64_t>(x.element_size());
  Tensor rows = uninitialized({num_rows, x.size(1)}, x);
  backend.gather_rows(
      {static_cast<const char*>(x.const_data_ptr()), slot_of_row.const_data_ptr<int64_t>(), num_rows, topk, row_bytes,
       static_cast<char*>(rows.mutable_data_ptr()), backend.threads(2 * num_rows * row_bytes)},
      x.size(0));
  return rows;
}

template <typename B>
Tensor unpermute(const Tensor& rows, const MaybeTensor& probs, const Tensor& row_of_slot) {
  const B backend(rows, "rows");
  backend.check_rows(rows, "rows");
  backend.check_contiguous(row_of_slot, "row_of_slot", 2, kLong);
  backend.check_sizes(probs, "probs", row_of_slot.sizes(), kFloat);
  SAMOE_CHECK(row_of_slot.size(1) >= 1, "row_of_slot is ", row_of_slot.sizes(), "; a token has at least one slot");
  backend.check_index(row_of_slot, "row_of_slot", -1, rows.size(0));
  Tensor y = uninitialized({row_of_slot.size(0), rows.size(1)}, rows);
  backend.unpermute({dtype_of(rows), rows.const_data_ptr(), data_or_null<float>(probs),
                     row_of_slot.const_data_ptr<int64_t>(), row_of_slot.size(0), row_of_slot.size(1), rows.size(1),
                     y.mutable_data_ptr(), backend.threads(nbytes(rows) + nbytes(y))},
                    rows.size(0));
  return y;
}

template <typename B>
std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& dy, const Tensor& rows, const Tensor& probs,
                                              const Tensor& slot_of_row, const Tensor& row_of_slot) {
  const B backend(rows, "rows");
  backend.check_rows(rows, "rows");
  backend.check_contiguous(row_of_slot, "row_of_slot", 2, kLong);
  backend.check_sizes(dy, "dy", {row_of_slot.size(0), rows.size(1)}, rows.scalar_type());
  backend.check_sizes(probs, "probs", row_of_slot.sizes(), kFloat);
  backend.check_index(row_of_slot, "row_of_slot", -1, rows.size(0));
  backend.check_contiguous(slot_of_row, "slot_of_row", 1, kLong);
  SAMOE_CHECK(slot_of_row.numel() == rows.size(0), "slot_of_row has ", slot_of_row.numel(), " rows");
  SAMOE_CHECK(rows.size(0) <= row_of_slot.numel(), "there are ", rows.size(0), " rows of ", row_of_slot.numel(), " slots");
  backend.check_index(slot_of_row, "slot_of_row", 0, row_of_slot.numel());
  Tensor drows = uninitialized(rows.sizes(), rows), dprobs = uninitialized(probs.sizes(), probs);
  backend.unpermute_backward({dtype_of(rows), dy.const_data_ptr(), rows.const_data_ptr(),
                              probs.const_data_ptr<float>(), slot_of_row.const_data_ptr<int64_t>(),
                              row_of_slot.const_data_ptr<int64_t>(), row_of_slot.size(0), row_of_slot.size(1),
                              rows.size(1), drows.mutable_data_ptr(),
                              dprobs.mutable_data_ptr<float>(),
                              backend.threads(2 * nbytes(rows))},
                             rows.size(0));
  return {drows, dprobs};
}

template <typename T>
cpu::Strided3<T> strided(T* data, const Tensor& tensor, int64_t unit = 1) {
  return {data, tensor.stride(0) * unit, tensor.stride(1) * unit};
}

inline void check_strided(const TensorChecks& checks, const Tensor& tensor, const char* name, ScalarType dtype,
                          Sizes sizes) {
  checks.check_tensor(tensor, name, 3, dtype);
  SAMOE_CHECK(tensor.sizes().equals(sizes), name, " is ", tensor.sizes(), ", not ", sizes);
  SAMOE_CHECK(tensor.stride(2) == 1 || tensor.size(2) <= 1, name, " is not contiguous in its last dim");
}

struct BankSizes {
  int64_t num_layers, num_groups, num_banks, num_elements;
};

inline BankSizes check_banks(const TensorChecks& checks, const Tensor& coefficients, const Tensor& banks) {
  checks.check_contiguous(coefficients, "coefficients", 3, kFloat);
  checks.check_tensor(banks, "banks", 3, kFloat);
  const BankSizes sizes = {coefficients.size(0), coefficients.size(1), coefficients.size(2), banks.size(2)};
  check_strided(checks, banks, "banks", kFloat, {sizes.num_banks, sizes.num_groups, sizes.num_elements});
  return sizes;
}

template <typename B>
void combine_banks(const Tensor& coefficients, const Tensor& banks, const Tensor& out) {
  const B backend(coefficients, "coefficients");
  const auto [num_layers, num_groups, num_banks, num_elements] = check_banks(backend, coefficients, banks);
  SAMOE_CHECK(out.scalar_type() == kFloat || out.scalar_type() == kBFloat16, "out is ", out.scalar_type());
  check_strided(backend, out, "out", out.scalar_type(), {num_layers, num_groups, num_elements});
  if (out.numel() == 0) return;
  backend.combine(
      {coefficients.const_data_ptr<float>(), strided(banks.const_data_ptr<float>(), banks), dtype_of(out),
       strided(static_cast<char*>(out.mutable_data_ptr()), out, static_cast<int64_t>(out.element_size())), num_layers,
       num_groups, num_banks, num_elements,
       backend.threads((num_layers + num_banks) * num_groups * num_elements * 4)});
}

template <typename B>
Tensor combine_banks_backward(const Tensor& coefficients, const Tensor& banks, const Tensor& dweights,
                              const Tensor& dbanks) {
  const B backend(coefficients, "coefficients");
  const auto [num_layers, num_groups, num_banks, num_elements] = check_banks(backend, coefficients, banks);
  check_strided(backend, dbanks, "dbanks", kFloat, {num_banks, num_groups, num_elements});
  check_strided(backend, dweights, "dweights", kFloat, {num_layers, num_groups, num_elements});
  Tensor dcoefficients = uninitialized(coefficients.sizes(), coefficients);
  if (coefficients.numel() == 0) return dcoefficients;
  backend.combine_backward(
      {coefficients.const_data_ptr<float>(), strided(banks.const_data_ptr<float>(), banks),
       strided(dweights.const_data_ptr<float>(), dweights), strided(dbanks.mutable_data_ptr<float>(), dbanks),
       dcoefficients.mutable_data_ptr<float>(), num_layers, num_groups, num_banks, num_elements,
       backend.threads((num_layers + 3 * num_banks) * num_groups * num_elements * 4)});
  return dcoefficients;
}

template <typename B>
void add_moe_ops(Library& m) {
  SAMOE_IMPL(m, "topk_gate", topk_gate<B>);
  SAMOE_IMPL(m, "topk_gate_backward", topk_gate_backward<B>);
  SAMOE_IMPL(m, "make_permutation", make_permutation<B>);
  SAMOE_IMPL(m, "permute", permute<B>);
  SAMOE_IMPL(m, "unpermute", unpermute<B>);
  SAMOE_IMPL(m, "unpermute_backward", unpermute_backward<B>);
  SAMOE_IMPL(m, "combine_banks", combine_banks<B>);
  SAMOE_IMPL(m, "combine_banks_backward", combine_banks_backward<B>);
}

}  // namespace ops
}  // namespace samoe

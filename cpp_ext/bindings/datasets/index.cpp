// The index ops of the datasets: checks, launch. CPU tensors only.

#include <limits>
#include <tuple>

#include "../check.h"
#include "../../kernels/cpu/dataset_index.h"

namespace {

using namespace samoe;
namespace datasets = samoe::datasets;

int64_t shuffle_legacy(Tensor values, Tensor key, int64_t position) {
  check_contiguous(key, "key", 1, kInt);
  SAMOE_CHECK(key.numel() == 624, "key has ", key.numel(), " words, not 624");
  check_range(position, "position", 0, 624);
  auto* words = reinterpret_cast<uint32_t*>(key.mutable_data_ptr<int32_t>());
  const int start = static_cast<int>(position);
  if (values.scalar_type() == kInt) {
    check_contiguous(values, "values", 1, kInt);
    return datasets::shuffle_legacy(values.mutable_data_ptr<int32_t>(), values.numel(), words, start);
  }
  check_contiguous(values, "values", 1, kLong);
  return datasets::shuffle_legacy(values.mutable_data_ptr<int64_t>(), values.numel(), words, start);
}

void build_sample_index(const Tensor& lengths, const Tensor& documents, int64_t seq_length, Tensor starts) {
  check_contiguous(lengths, "lengths", 1, kInt);
  check_contiguous(documents, "documents", 1, kInt);
  check_contiguous(starts, "starts", 2, starts.scalar_type() == kLong ? kLong : kInt);
  SAMOE_CHECK(starts.size(0) >= 1 && starts.size(1) == 2, "starts must be [samples + 1, 2]");
  SAMOE_CHECK(seq_length >= 1, "seq_length = ", seq_length, ": at least 1");
  const int32_t *length_data = lengths.const_data_ptr<int32_t>(), *document_data = documents.const_data_ptr<int32_t>();
  const int64_t num_samples = starts.size(0) - 1;
  const bool whole =
      starts.scalar_type() == kInt
          ? datasets::build_sample_index(length_data, lengths.numel(), document_data, documents.numel(), seq_length,
                                         starts.mutable_data_ptr<int32_t>(), num_samples)
          : datasets::build_sample_index(length_data, lengths.numel(), document_data, documents.numel(), seq_length,
                                         starts.mutable_data_ptr<int64_t>(), num_samples);
  SAMOE_CHECK(whole, "a sequence has a negative length, or the sequences hold fewer tokens than they should");
}

void build_blending_index(const Tensor& weights, const Tensor& limits, Tensor dataset_index,
                          Tensor dataset_sample_index) {
  check_contiguous(weights, "weights", 1, kDouble);
  check_contiguous(limits, "limits", 1, kLong);
  check_contiguous(dataset_index, "dataset_index", 1, kShort);
  check_contiguous(dataset_sample_index, "dataset_sample_index", 1, kLong);
  const int64_t num_datasets = weights.numel(), size = dataset_index.numel();
  SAMOE_CHECK(limits.numel() == num_datasets && dataset_sample_index.numel() == size, "sizes do not match");
  SAMOE_CHECK(num_datasets >= 1 && num_datasets < 32767, num_datasets, " datasets: from 1 to 32766");
  const int64_t* limit = limits.const_data_ptr<int64_t>();
  int64_t left = size;
  for (int64_t dataset = 0; dataset < num_datasets && left > 0; ++dataset) {
    SAMOE_CHECK(limit[dataset] >= 0, "the limit of dataset ", dataset, " is ", limit[dataset]);
    left -= limit[dataset];
  }
  SAMOE_CHECK(left <= 0, "the limits do not allow ", size, " samples");
  datasets::build_blending_index(weights.const_data_ptr<double>(), limit, num_datasets,
                                 dataset_index.mutable_data_ptr<int16_t>(),
                                 dataset_sample_index.mutable_data_ptr<int64_t>(), size);
}

template <typename Start>
bool gather_rows(const datasets::TokenSource& source, const Start* starts, int64_t num_samples, Sizes samples,
                 int64_t dtype_code, Tensor& out, int64_t* low, int64_t* high) {
  int64_t* row = out.mutable_data_ptr<int64_t>();
  const int64_t row_tokens = out.size(1);
  for (const int64_t sample : samples) {
    if (sample < 0 || sample >= num_samples) return false;
    const Start* start = starts + 2 * sample;
    const auto gather = [&](auto token) {
      return datasets::gather_row<decltype(token)>(source, start[0], start[1], start[2], start[3], row, row_tokens, low,
                                                   high);
    };
    bool whole = false;
    switch (dtype_code) {  // the codes of the .idx format
      case 1: whole = gather(uint8_t{}); break;
      case 2: whole = gather(int8_t{}); break;
      case 3: whole = gather(int16_t{}); break;
      case 4: whole = gather(int32_t{}); break;
      case 5: whole = gather(int64_t{}); break;
      case 8: whole = gather(uint16_t{}); break;
      default: SAMOE_CHECK(false, "dtype code ", dtype_code, " is no integer type");
    }
    if (!whole) return false;
    row += row_tokens;
  }
  return true;
}

std::tuple<int64_t, int64_t> gather_samples(const Tensor& bin, const Tensor& pointers, const Tensor& lengths,
                                            const Tensor& documents, const Tensor& starts, Sizes samples,
                                            int64_t dtype_code, Tensor out) {
  check_contiguous(bin, "bin", 1, kByte);
  check_contiguous(pointers, "pointers", 1, kLong);
  check_contiguous(lengths, "lengths", 1, kInt);
  check_contiguous(documents, "documents", 1, kInt);
  check_contiguous(starts, "starts", 2, starts.scalar_type() == kLong ? kLong : kInt);
  check_contiguous(out, "out", 2, kLong);
  SAMOE_CHECK(starts.size(0) >= 1 && starts.size(1) == 2 && pointers.numel() == lengths.numel() &&
                        out.size(0) == static_cast<int64_t>(samples.size()),
                    "sizes do not match");
  const datasets::TokenSource source{bin.const_data_ptr<uint8_t>(),       bin.numel(),
                                     pointers.const_data_ptr<int64_t>(),  lengths.const_data_ptr<int32_t>(),
                                     lengths.numel(),                     documents.const_data_ptr<int32_t>(),
                                     documents.numel()};
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();
  const int64_t num_samples = starts.size(0) - 1;
  const bool whole = starts.scalar_type() == kInt
                         ? gather_rows(source, starts.const_data_ptr<int32_t>(), num_samples, samples, dtype_code, out,
                                       &low, &high)
                         : gather_rows(source, starts.const_data_ptr<int64_t>(), num_samples, samples, dtype_code, out,
                                       &low, &high);
  SAMOE_CHECK(whole, "a sample does not lie inside the data");
  return {low, high};
}

}  // namespace

SAMOE_LIBRARY_IMPL(megatron_samoe, CPU, m) {
  SAMOE_IMPL(m, "shuffle_legacy", shuffle_legacy);
  SAMOE_IMPL(m, "build_sample_index", build_sample_index);
  SAMOE_IMPL(m, "build_blending_index", build_blending_index);
  SAMOE_IMPL(m, "gather_samples", gather_samples);
}

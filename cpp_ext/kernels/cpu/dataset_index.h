// Index arithmetic of the datasets, on raw pointers. Meanings: megatron_samoe/datasets/sample_index.py, whose numpy
// bodies are the twins.
#pragma once

#include <cstdint>

namespace samoe {
namespace datasets {

// Shuffles values in place as numpy's legacy RandomState.shuffle does, from the generator state (624 words and a
// position in them), and leaves the state it would leave. Returns the new position.
template <typename T>
int shuffle_legacy(T* values, int64_t count, uint32_t* key, int position);

// Fills starts [num_samples + 1, 2] with (position in documents, token offset). Returns false if a document number or
// a length is impossible or the tokens do not suffice.
template <typename T>
bool build_sample_index(const int32_t* lengths, int64_t num_sequences, const int32_t* documents, int64_t num_documents,
                        int64_t seq_length, T* starts, int64_t num_samples);

// Gives sample n to the dataset furthest behind weights[d] * max(n, 1), among those with fewer than limits[d] samples.
void build_blending_index(const double* weights, const int64_t* limits, int64_t num_datasets, int16_t* dataset_index,
                          int64_t* dataset_sample_index, int64_t size);

// The data of a dataset, and the limits that every read is held against.
struct TokenSource {
  const uint8_t* bin;
  int64_t bin_bytes;
  const int64_t* pointers;
  const int32_t* lengths;
  int64_t num_sequences;
  const int32_t* documents;
  int64_t num_documents;
};

// Copies the tokens from (first, first_offset) up to and with (last, last_offset) to out, widened to int64, and widens
// [low, high] to hold them. Returns false if the range is not exactly row_tokens tokens inside the data.
template <typename Token>
bool gather_row(const TokenSource& source, int64_t first, int64_t first_offset, int64_t last, int64_t last_offset,
                int64_t* out, int64_t row_tokens, int64_t* low, int64_t* high);

}  // namespace datasets
}  // namespace samoe

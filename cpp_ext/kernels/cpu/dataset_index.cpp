// Index arithmetic of the datasets. What makes it fast is asking for memory before it is needed: the random accesses
// (swaps of a shuffle, lengths of shuffled documents) are known ahead, and are prefetched.
#include "dataset_index.h"

#include <cstring>
#include <utility>
#include <vector>

namespace samoe {
namespace datasets {

namespace {

constexpr int kStateWords = 624;
constexpr int kShiftWords = 397;
// Random accesses in flight: enough to cover the latency of memory, few enough for the caches.
constexpr int64_t kAhead = 256;
constexpr int64_t kLengthsAhead = 24;

// The Mersenne Twister (Matsumoto and Nishimura, 1998) in numpy's state layout.
class Twister {
 public:
  Twister(uint32_t* key, int position) : key_(key), position_(position) {}

  uint32_t next() {
    if (position_ == kStateWords) refill();
    uint32_t word = key_[position_++];
    word ^= word >> 11;
    word ^= (word << 7) & 0x9d2c5680u;
    word ^= (word << 15) & 0xefc60000u;
    return word ^ (word >> 18);
  }

  // A number in [0, limit], by masked rejection as numpy's legacy generator draws it.
  uint64_t interval(uint64_t limit, uint64_t mask) {
    uint64_t value;
    if (limit <= 0xffffffffu) {
      do value = next() & mask;
      while (value > limit);
    } else {
      do {
        value = static_cast<uint64_t>(next()) << 32;
        value = (value | next()) & mask;
      } while (value > limit);
    }
    return value;
  }

  int position() const { return position_; }

 private:
  static uint32_t twist(uint32_t high, uint32_t low) {
    const uint32_t mixed = (high & 0x80000000u) | (low & 0x7fffffffu);
    return (mixed >> 1) ^ ((mixed & 1u) ? 0x9908b0dfu : 0u);
  }

  void refill() {
    int k = 0;
    for (; k < kStateWords - kShiftWords; ++k) key_[k] = key_[k + kShiftWords] ^ twist(key_[k], key_[k + 1]);
    for (; k < kStateWords - 1; ++k) key_[k] = key_[k + kShiftWords - kStateWords] ^ twist(key_[k], key_[k + 1]);
    key_[k] = key_[kShiftWords - 1] ^ twist(key_[k], key_[0]);
    position_ = 0;
  }

  uint32_t* key_;
  int position_;
};

uint64_t mask_of(uint64_t limit) {
  uint64_t mask = limit;
  for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
  return mask;
}

}  // namespace

template <typename T>
int shuffle_legacy(T* values, int64_t count, uint32_t* key, int position) {
  Twister twister(key, position);
  int64_t partner[kAhead];
  for (int64_t top = count - 1; top >= 1; top -= kAhead) {
    const int64_t num = top < kAhead ? top : kAhead;
    for (int64_t k = 0; k < num; ++k) {
      const uint64_t limit = static_cast<uint64_t>(top - k);
      partner[k] = static_cast<int64_t>(twister.interval(limit, mask_of(limit)));
      __builtin_prefetch(values + partner[k], 1);
    }
    for (int64_t k = 0; k < num; ++k) std::swap(values[top - k], values[partner[k]]);
  }
  return twister.position();
}

template <typename T>
bool build_sample_index(const int32_t* lengths, int64_t num_sequences, const int32_t* documents, int64_t num_documents,
                        int64_t seq_length, T* starts, int64_t num_samples) {
  starts[0] = starts[1] = 0;
  int64_t sample = 1, next_start = seq_length, begin = 0;
  for (int64_t place = 0; place < num_documents && sample <= num_samples; ++place) {
    if (place + kLengthsAhead < num_documents) __builtin_prefetch(lengths + documents[place + kLengthsAhead]);
    const int64_t document = documents[place];
    if (document < 0 || document >= num_sequences) return false;
    const int64_t length = lengths[document];
    if (length < 0) return false;
    const int64_t end = begin + length;
    for (; next_start < end && sample <= num_samples; ++sample, next_start += seq_length) {
      starts[2 * sample] = static_cast<T>(place);
      starts[2 * sample + 1] = static_cast<T>(next_start - begin);
    }
    begin = end;
  }
  return sample > num_samples;
}

void build_blending_index(const double* weights, const int64_t* limits, int64_t num_datasets, int16_t* dataset_index,
                          int64_t* dataset_sample_index, int64_t size) {
  std::vector<int64_t> counts(static_cast<size_t>(num_datasets), 0);
  for (int64_t sample = 0; sample < size; ++sample) {
    const double wanted = sample < 1 ? 1.0 : static_cast<double>(sample);
    int64_t chosen = -1;
    double behind_most = 0.0;
    for (int64_t dataset = 0; dataset < num_datasets; ++dataset) {
      if (counts[dataset] >= limits[dataset]) continue;
      const double share = weights[dataset] * wanted;
      const double behind = share - static_cast<double>(counts[dataset]);
      if (chosen < 0 || behind > behind_most) {
        chosen = dataset;
        behind_most = behind;
      }
    }
    dataset_index[sample] = static_cast<int16_t>(chosen);
    dataset_sample_index[sample] = counts[chosen]++;
  }
}

template <typename Token>
bool gather_row(const TokenSource& source, int64_t first, int64_t first_offset, int64_t last, int64_t last_offset,
                int64_t* out, int64_t row_tokens, int64_t* low, int64_t* high) {
  if (first < 0 || first > last || last >= source.num_documents || first_offset < 0 || last_offset < 0) return false;
  int64_t filled = 0, smallest = *low, largest = *high;
  for (int64_t place = first; place <= last; ++place) {
    const int64_t document = source.documents[place];
    if (document < 0 || document >= source.num_sequences) return false;
    const int64_t length = source.lengths[document];
    const int64_t from = place == first ? first_offset : 0;
    const int64_t to = place == last ? last_offset + 1 : length;
    const int64_t pointer = source.pointers[document];
    if (from > to || to > length || to - from > row_tokens - filled || pointer < 0 ||
        pointer > source.bin_bytes - to * static_cast<int64_t>(sizeof(Token))) {
      return false;
    }
    const uint8_t* bytes = source.bin + pointer + from * static_cast<int64_t>(sizeof(Token));
    for (int64_t k = 0; k < to - from; ++k) {
      Token token;  // offsets in a file need not be aligned
      std::memcpy(&token, bytes + k * static_cast<int64_t>(sizeof(Token)), sizeof(Token));
      const int64_t value = static_cast<int64_t>(token);
      out[filled + k] = value;
      smallest = value < smallest ? value : smallest;
      largest = value > largest ? value : largest;
    }
    filled += to - from;
  }
  *low = smallest;
  *high = largest;
  return filled == row_tokens;
}

template int shuffle_legacy(int32_t*, int64_t, uint32_t*, int);
template int shuffle_legacy(int64_t*, int64_t, uint32_t*, int);
template bool build_sample_index(const int32_t*, int64_t, const int32_t*, int64_t, int64_t, int32_t*, int64_t);
template bool build_sample_index(const int32_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t*, int64_t);

#define SAMOE_GATHER_ROW(Token)                                                                                      \
  template bool gather_row<Token>(const TokenSource&, int64_t, int64_t, int64_t, int64_t, int64_t*, int64_t, int64_t*, \
                                  int64_t*);
SAMOE_GATHER_ROW(uint8_t)
SAMOE_GATHER_ROW(int8_t)
SAMOE_GATHER_ROW(int16_t)
SAMOE_GATHER_ROW(int32_t)
SAMOE_GATHER_ROW(int64_t)
SAMOE_GATHER_ROW(uint16_t)
#undef SAMOE_GATHER_ROW

}  // namespace datasets
}  // namespace samoe

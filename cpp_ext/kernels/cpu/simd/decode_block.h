// Blocks of a product: rows of x by rows of weights of any type, where the results go, and what is read after them.
#pragma once

#include "decode_stream.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

// Where a block of results goes: out[m][n - first] = (sum * scale[n] + bias[n]) * factor, or is added to.
struct DecodeOut {
  float* const* rows;
  int64_t first;
  const float* scale;
  const float* bias;
  bool accumulate;
  float factor;
};

// Up to four sums, from column n on; with all four, sizes of copies are known and become single instructions.
SAMOE_ALWAYS void put_some(const DecodeOut& out, int64_t m, int64_t n, size_t bytes, v4 sums) {
  v4 part = v4{};
  float* place = out.rows[m] + (n - out.first);
  if (out.scale != nullptr) memcpy(&part, out.scale + n, bytes), sums *= part;
  if (out.bias != nullptr) memcpy(&part, out.bias + n, bytes), sums += part;
  sums *= out.factor;
  if (out.accumulate) memcpy(&part, place, bytes), sums = part + sums;
  memcpy(place, &sums, bytes);
}
SAMOE_INLINE void put(const DecodeOut& out, int64_t m, int64_t n, int64_t count, v4 sums) {
  if (count == kTileOuts) {
    put_some(out, m, n, sizeof sums, sums);
  } else {
    put_some(out, m, n, static_cast<size_t>(count) * sizeof(float), sums);
  }
}

// What is read after a block: `bytes` from `data` on, or nothing.
struct Following {
  const void* data = nullptr;
  int64_t bytes = 0;
};

// Rows of x by rows first .. last - 1 of w, in tiles of up to `tile_rows`, of which the first one asks for weights ahead.
template <typename W>
SAMOE_INLINE void multiply_part(const char* const* x, int64_t num_rows, int64_t tile_rows, const W* w, int64_t inputs,
                                int64_t first, int64_t last, const DecodeOut& out, Ahead& ahead, Reading reading,
                                bool by_digits) {
  v4 sums[kMostRows] = {};
  Ahead nothing{nullptr, nullptr, nullptr, 0};
  for (int64_t n = first; n < last; n += kTileOuts) {
    const int64_t num_outs = last - n < kTileOuts ? last - n : kTileOuts;
    const W* rows[kTileOuts];
    for (int64_t i = 0; i < kTileOuts; ++i) rows[i] = w + (n + (i < num_outs ? i : num_outs - 1)) * inputs;
    // Tiles of nearly equal numbers of rows: small ones are the least efficient.
    const int64_t num_tiles = (num_rows + tile_rows - 1) / tile_rows;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t m = num_rows * i / num_tiles, count = num_rows * (i + 1) / num_tiles - m;
      Ahead& wanted = i == 0 ? ahead : nothing;
      multiply_rows(count, x + m, rows, inputs, wanted, reading, by_digits, sums);
      for (int64_t j = 0; j < count; ++j) put(out, m + j, n, num_outs, sums[j]);
    }
  }
}

// Up to kRowBlock packed rows of x with rows first .. last - 1 of w: rows of x that the first cache holds at a time, if the second
// one holds these rows of w. While the first rows of x are multiplied, w comes from memory; for the others it is there.
// A stream reads its rows of x again for each row of w: two thirds of the first cache hold them.
template <typename W>
static void multiply_block(const char* const* x, int64_t num_rows, const W* w, int64_t inputs, int64_t first,
                           int64_t last, const DecodeOut& out, Following following, bool by_digits) {
  const int64_t tile_rows = by_digits ? kDigitRows : (sizeof(W) == 2 ? kPairRows : kTileRows);
  const int64_t num_tiles = (num_rows + tile_rows - 1) / tile_rows, x_bytes = inputs * (by_digits ? 3 : 4);
  const int64_t row_bytes = inputs * static_cast<int64_t>(sizeof(W));
  const Caches& here = caches();
  const bool fits = inputs > 0 && tile_rows * x_bytes <= kPartBytes;
  int64_t most = fits ? kPartBytes / (tile_rows * x_bytes) : 1;
  if ((last - first) * row_bytes > kTaskBytes && num_tiles > 0) most = num_tiles;
  const int64_t num_parts = (num_tiles + most - 1) / most;
  const char* const begin = reinterpret_cast<const char*>(w + first * inputs);
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t m = num_rows * (num_tiles * part / num_parts) / num_tiles;
    const int64_t count = num_rows * (num_tiles * (part + 1) / num_parts) / num_tiles - m;
    const bool is_short = count == 1 || sizeof(W) != 2 || 3 * count * x_bytes <= 2 * here.first_bytes;
    const bool streams = part == 0 && count <= stream_rows<W>(by_digits) && is_short;
    const Reading reading = streams ? here.of_streams : Reading::tiles;
    Ahead ahead{nullptr, nullptr, nullptr, 0};
    if (part == 0)
      ahead = {begin + ahead_bytes(row_bytes, streams ? stream_side(count) : kTileOuts, reading),
               begin + (last - first) * row_bytes, static_cast<const char*>(following.data), following.bytes};
    DecodeOut some = out;
    some.rows += m;
    multiply_part(x + m, count, streams ? count : tile_rows, w, inputs, first, last, some, ahead, reading, by_digits);
  }
}

// The same for any type of weights; `row` is the first row of the matrix within its stack.
SAMOE_INLINE void multiply(const char* const* x, int64_t num_rows, const Matrix& w, int64_t row, int64_t inputs,
                           int64_t first, int64_t last, DecodeOut out, Following following) {
  const int64_t offset = row * inputs;
  switch (w.type) {
    case WeightType::f32:
      return multiply_block(x, num_rows, static_cast<const float*>(w.data) + offset, inputs, first, last, out,
                            following, false);
    case WeightType::bf16:
      return multiply_block(x, num_rows, static_cast<const uint16_t*>(w.data) + offset, inputs, first, last, out,
                            following, false);
    case WeightType::i8:
      out.scale = w.scale + row;
      return multiply_block(x, num_rows, static_cast<const int8_t*>(w.data) + offset, inputs, first, last, out,
                            following, takes_digits(inputs));
  }
}

// What is asked for ahead from row `row` of a stack of matrices on.
SAMOE_INLINE Following start_of(const Matrix& w, int64_t row, int64_t inputs) {
  const int64_t row_bytes = inputs * (w.type == WeightType::f32 ? 4 : (w.type == WeightType::bf16 ? 2 : 1));
  const int64_t by_stream = ahead_bytes(row_bytes, 2, caches().of_streams);
  const int64_t by_tiles = ahead_bytes(row_bytes, kTileOuts, Reading::tiles);
  return {static_cast<const char*>(w.data) + row * row_bytes, by_stream < by_tiles ? by_tiles : by_stream};
}

// Asks for what a product begins with, before something else is waited for.
SAMOE_INLINE void ask_for(const Following& following) {
  const char* data = static_cast<const char*>(following.data);
  const int64_t bytes = following.bytes < 2 * kAheadBytes ? following.bytes : 2 * kAheadBytes;
  for (int64_t i = 0; i < bytes; i += kLineBytes) __builtin_prefetch(data + i, 0, 2);
}

// One row normalised, times weight, plus bias. The mean square is taken around the mean unless rms.
SAMOE_INLINE void normalise(const float* x, const float* weight, const float* bias, float epsilon, bool rms,
                            int64_t size, float* out) {
  const int64_t whole = size / kLanes * kLanes;
  float mean = 0.0f;
  if (!rms) {
    vf sum = vf{};
    for (int64_t i = 0; i < whole; i += kLanes) sum += load(x + i);
    mean = sum_lanes(sum);
    for (int64_t i = whole; i < size; ++i) mean += x[i];
    mean /= static_cast<float>(size);
  }
  vf squares = vf{};
  for (int64_t i = 0; i < whole; i += kLanes) {
    const vf d = load(x + i) - mean;
    squares += d * d;
  }
  float square = sum_lanes(squares);
  for (int64_t i = whole; i < size; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / __builtin_sqrtf(square / static_cast<float>(size) + epsilon);
  for (int64_t i = 0; i < size; ++i) {
    const float y = (x[i] - mean) * scale * weight[i];
    out[i] = bias == nullptr ? y : y + bias[i];
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe

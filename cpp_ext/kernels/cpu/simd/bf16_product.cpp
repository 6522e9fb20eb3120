// Matrix products of bf16 summed in fp32, on CPUs with AVX-512's bf16 dot products: an expert's shapes change with the
// routing, and this needs no code made for each, rounds no weight gradient, and runs at the rate of the instruction.
//
// B is packed by panels of 48 columns, pairs of its rows side by side as the instruction takes them; a tile of 8 rows
// by 48 columns of the result stays in 24 registers over all of K.
#include <cstring>

#include "bf16_vec.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {

#if defined(__AVX512F__)

namespace {

constexpr int kTileRows = 8;
constexpr int kTileVectors = 3;
constexpr int64_t kPanel = 16 * kTileVectors;  // columns
constexpr int64_t kPairs = 1024;               // of a panel of a product that is added to: 192 KB
constexpr int64_t kPairsAhead = 16;            // of a panel, asked for from the second-level cache
constexpr int64_t kStride = 32;                // pairs between requests for the next panel
constexpr int64_t kKeptPanels = 1 << 18;       // elements of B whose panels all stay in the second-level cache

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// 16 columns of two rows as pairs; a row that does not exist is null.
struct RowPair {
  const uint16_t *first, *second;
};
SAMOE_BF16 inline __m512i pairs_of(const RowPair& rows, int64_t column, __mmask16 mask) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows.first + column));
  if (rows.second == nullptr) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows.second + column));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Rows become columns: out[i] holds dword i of all 16.
SAMOE_BF16 inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_i32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
  }
}

// Rows 2 pair and 2 pair + 1 of x, whose last row may have no partner.
SAMOE_BF16 inline RowPair row_pair(const uint16_t* x, int64_t stride, int64_t rows, int64_t pair) {
  const uint16_t* first = x + 2 * pair * stride;
  return {first, 2 * pair + 1 < rows ? first + stride : nullptr};
}

// Packs up to 48 columns of B [K, N] as panel[pair][48], filled with zeros; a pair is two elements along K.
SAMOE_BF16 void pack_panel(const uint16_t* b, int64_t stride, int64_t k, int64_t columns, uint32_t* panel) {
  for (int64_t pair = 0; 2 * pair < k; ++pair, panel += kPanel) {
    const RowPair rows = row_pair(b, stride, k, pair);
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t left = columns - 16 * v;
      _mm512_storeu_si512(panel + 16 * v, left > 0 ? pairs_of(rows, 16 * v, first16(left)) : _mm512_setzero_si512());
    }
  }
}

// The same where B is given as its transpose [N, K], whose rows are the columns.
SAMOE_BF16 void pack_panel_of_transposed(const uint16_t* b, int64_t stride, int64_t k, int64_t columns, uint32_t* panel) {
  for (int64_t at = 0; at < k; at += 32) {
    const __mmask32 mask = k - at >= 32 ? ~__mmask32{0} : (__mmask32{1} << (k - at)) - 1;
    const int64_t pairs = at_most(16, (k - at + 1) / 2);
    uint32_t* out = panel + at / 2 * kPanel;
    for (int v = 0; v < kTileVectors; ++v) {
      __m512i r[16];
      for (int i = 0; i < 16; ++i) {
        r[i] = 16 * v + i < columns ? _mm512_maskz_loadu_epi16(mask, b + (16 * v + i) * stride + at)
                                    : _mm512_setzero_si512();
      }
      transpose(r);
      for (int64_t p = 0; p < pairs; ++p) _mm512_storeu_si512(out + p * kPanel + 16 * v, r[p]);
    }
  }
}

// Tiles [pair][8] of rows of A that are columns of its transpose, [K, M].
SAMOE_BF16 void pack_tiles(const uint16_t* a, int64_t stride, int64_t k, int64_t m, uint32_t* tiles) {
  const int64_t pairs = (k + 1) / 2;
  for (int64_t row = 0; row < m; row += 2 * kTileRows) {
    uint32_t* out = tiles + row * pairs;
    const bool two = m - row > kTileRows;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const __m512i dwords = pairs_of(row_pair(a, stride, k, pair), row, first16(m - row));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + pair * kTileRows), _mm512_castsi512_si256(dwords));
      if (two) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (pairs + pair) * kTileRows),
                            _mm512_extracti64x4_epi64(dwords, 1));
      }
    }
  }
}

// Rows of an odd number of elements, followed by a zero: the last pair of a row must not read its neighbour's first.
void pad_rows(const uint16_t* a, int64_t stride, int64_t k, int64_t m, uint32_t* rows) {
  uint16_t* out = reinterpret_cast<uint16_t*>(rows);
  for (int64_t row = 0; row < m; ++row, out += k + 1) {
    std::memcpy(out, a + row * stride, static_cast<size_t>(k) * sizeof(uint16_t));
    out[k] = 0;
  }
}

SAMOE_BF16 inline __m512i pair_at(const char* p) {
  int32_t dword;
  std::memcpy(&dword, p, sizeof dword);
  return _mm512_set1_epi32(dword);
}

// What of B the next panel takes, asked for while this one is multiplied: a few lines every kStride pairs, since more at once
// than the core can wait for would hold it up.
struct Ahead {
  const char* line;
  const char* row_end;
  int64_t row_bytes, stride, rows;  // rows that are left
  int64_t lines_per_stride;

  SAMOE_BF16 void step() {
    for (int64_t i = 0; i < lines_per_stride && rows > 0; ++i) {
      __builtin_prefetch(line, 0, 2);
      line += 64;
      if (line < row_end) continue;
      --rows;
      row_end += stride;
      line = row_end - row_bytes;
    }
  }
};

template <int ROWS>
SAMOE_BF16 void multiply_tile(const char* a, int64_t row_bytes, int64_t pair_bytes, const uint32_t* panel,
                              int64_t pairs, const Bf16Product& p, int64_t row, int64_t column, Ahead& ahead) {
  __m512 sum[ROWS][kTileVectors];
  for (int i = 0; i < ROWS; ++i)
    for (int v = 0; v < kTileVectors; ++v) sum[i][v] = _mm512_setzero_ps();
  if (p.sum != nullptr && row + 2 * kTileRows <= p.m) {
    // The sums of the next rows come in while these are multiplied.
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kTileVectors; ++v)
        __builtin_prefetch(p.sum + (row + kTileRows + i) * p.out_stride + column + 16 * v, 1);
  }
  for (int64_t begin = 0; begin < pairs; begin += kStride) {
    ahead.step();
    for (int64_t pair = begin; pair < at_most(pairs, begin + kStride); ++pair, a += pair_bytes, panel += kPanel) {
      __m512bh b[kTileVectors];
      for (int v = 0; v < kTileVectors; ++v) {
        b[v] = (__m512bh)_mm512_loadu_si512(panel + 16 * v);
        __builtin_prefetch(panel + kPairsAhead * kPanel + 16 * v);
      }
      for (int i = 0; i < ROWS; ++i) {
        const __m512bh x = (__m512bh)pair_at(a + i * row_bytes);
        for (int v = 0; v < kTileVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], x, b[v]);
      }
    }
  }
  // Unrolled, or the sums would have to have addresses.
#pragma GCC unroll 3
  for (int v = 0; v < kTileVectors; ++v) {
    const __mmask16 mask = first16(p.n - column - 16 * v);
    const int64_t at = row * p.out_stride + column + 16 * v;
    if (p.sum != nullptr) {
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        float* out = p.sum + at + i * p.out_stride;
        _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sum[i][v]));
      }
      continue;
    }
    const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.bias + column + 16 * v);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) store16(p.out + at + i * p.out_stride, _mm512_add_ps(sum[i][v], bias), mask);
  }
}

using TileProduct = void (*)(const char*, int64_t, int64_t, const uint32_t*, int64_t, const Bf16Product&, int64_t,
                             int64_t, Ahead&);
constexpr TileProduct kTileProducts[kTileRows] = {
    multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>,
    multiply_tile<5>, multiply_tile<6>, multiply_tile<7>, multiply_tile<8>};

// A as the tiles take it: pair p of row r of tile t is at data + t * tile + r * row + p * pair, all in bytes.
struct Tiles {
  const char* data;
  int64_t tile, row, pair;
};

Tiles tiles_of(const Bf16Product& p, int64_t from, int64_t k, uint32_t* work) {
  const int64_t pairs = (k + 1) / 2;
  if (p.a_transposed) {
    pack_tiles(p.a + from * p.a_stride, p.a_stride, k, p.m, work);
    return {reinterpret_cast<const char*>(work), 4 * kTileRows * pairs, 4, 4 * kTileRows};
  }
  if (k % 2 != 0) {
    pad_rows(p.a + from, p.a_stride, k, p.m, work);
    return {reinterpret_cast<const char*>(work), 4 * kTileRows * pairs, 4 * pairs, 4};
  }
  return {reinterpret_cast<const char*>(p.a + from), 2 * kTileRows * p.a_stride, 2 * p.a_stride, 4};
}

void multiply(const Bf16Product& p, const Tiles& a, int64_t tile, const uint32_t* panel, int64_t pairs, int64_t row,
              int64_t column, Ahead& ahead) {
  kTileProducts[at_most(kTileRows, p.m - row) - 1](a.data + tile * a.tile, a.row, a.pair, panel, pairs, p, row, column,
                                                   ahead);
}

// The panel of B from `column` on, in as few lines at a time as bring it while all tiles are multiplied.
Ahead panel_ahead(const Bf16Product& p, const uint16_t* b, int64_t k, int64_t column, int64_t num_tiles) {
  if (column >= p.n) return {};
  const int64_t columns = at_most(kPanel, p.n - column), rows = p.b_transposed ? columns : k;
  const int64_t row_bytes = 2 * (p.b_transposed ? k : columns), stride = 2 * p.b_stride;
  const char* first = reinterpret_cast<const char*>(b + column * (p.b_transposed ? p.b_stride : 1));
  const int64_t lines = rows * (row_bytes / 64 + 1), strides = ((k + 1) / 2 + kStride - 1) / kStride * num_tiles;
  return {first, first + row_bytes, row_bytes, stride, rows, (lines + strides - 1) / strides};
}

void pack_panel_of_b(const Bf16Product& p, const uint16_t* b, int64_t k, int64_t column, uint32_t* panel) {
  const int64_t columns = at_most(kPanel, p.n - column);
  if (p.b_transposed) {
    pack_panel_of_transposed(b + column * p.b_stride, p.b_stride, k, columns, panel);
  } else {
    pack_panel(b + column, p.b_stride, k, columns, panel);
  }
}

// Whether all of B is packed and A's tiles follow one another, because B is the smaller, or small, and whole rows of
// sums come and go; else A stays, by panels of B.
bool goes_by_tiles(const Bf16Product& p) {
  return p.a_transposed && (p.m > p.n || p.k * p.n <= kKeptPanels);
}

// Elements of K from `from` on, k of them; no more than one pass where the result is rounded.
void multiply_pass(const Bf16Product& p, int64_t from, int64_t k, uint32_t* work) {
  const int64_t pairs = (k + 1) / 2;
  const uint16_t* b = p.b + from * (p.b_transposed ? 1 : p.b_stride);
  if (goes_by_tiles(p)) {
    uint32_t* panels = work + 2 * kTileRows * pairs;
    Ahead nothing{};
    for (int64_t column = 0; column < p.n; column += kPanel) pack_panel_of_b(p, b, k, column, panels + column * pairs);
    const uint16_t* a = p.a + from * p.a_stride;
    for (int64_t row = 0; row < p.m; row += 2 * kTileRows) {
      pack_tiles(a + row, p.a_stride, k, at_most(2 * kTileRows, p.m - row), work);
      const Tiles two = {reinterpret_cast<const char*>(work), 4 * kTileRows * pairs, 4, 4 * kTileRows};
      for (int64_t t = 0; t < 2 && row + t * kTileRows < p.m; ++t) {
        for (int64_t column = 0; column < p.n; column += kPanel)
          multiply(p, two, t, panels + column * pairs, pairs, row + t * kTileRows, column, nothing);
      }
    }
    return;
  }
  const Tiles a = tiles_of(p, from, k, work + kPanel * pairs);
  const int64_t num_tiles = (p.m + kTileRows - 1) / kTileRows;
  for (int64_t column = 0; column < p.n; column += kPanel) {
    pack_panel_of_b(p, b, k, column, work);
    Ahead ahead = panel_ahead(p, b, k, column + kPanel, num_tiles);
    for (int64_t t = 0; t < num_tiles; ++t) multiply(p, a, t, work, pairs, t * kTileRows, column, ahead);
  }
}

// Elements of K that are multiplied at a time: all, but that a sum may be added to in several turns.
int64_t k_per_pass(const Bf16Product& p) { return p.sum == nullptr ? p.k : at_most(p.k, 2 * kPairs); }

}  // namespace

bool has_bf16_product() { return __builtin_cpu_supports("avx512bf16"); }

int64_t bf16_product_workspace_bytes(const Bf16Product& p) {
  const int64_t pairs = (k_per_pass(p) + 1) / 2;
  if (goes_by_tiles(p)) return 4 * pairs * (2 * kTileRows + (p.n + kPanel - 1) / kPanel * kPanel);
  const bool repacked = p.a_transposed || p.k % 2 != 0;
  return 4 * pairs * (kPanel + (repacked ? (p.m + kTileRows - 1) / kTileRows * kTileRows : 0));
}

void bf16_product(const Bf16Product& p, void* work) {
  const int64_t step = k_per_pass(p);
  for (int64_t from = 0; from < p.k; from += step)
    multiply_pass(p, from, at_most(step, p.k - from), static_cast<uint32_t*>(work));
}

#else

bool has_bf16_product() { return false; }
int64_t bf16_product_workspace_bytes(const Bf16Product&) { return 0; }
void bf16_product(const Bf16Product&, void*) {}

#endif

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe

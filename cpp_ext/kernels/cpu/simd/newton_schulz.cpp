// Newton-Schulz steps of many small matrices, each on one thread and in its cache. Polynomials of x x^T are symmetric, so
// half of them is multiplied and the rest is copied. optimizer/muon.py says how several steps are taken at once.
#include <cmath>
#include <utility>

#include "../../kernels.h"
#include "decode_tile.h"

namespace samoe {
namespace cpu {
namespace SAMOE_ISA {
namespace {

constexpr int kTall = 6;  // rows of a tile: with four vectors 24 sums
constexpr int kWide = 4;

int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Rows of padded floats, one `stride` after another.
struct Matrix {
  float* data;
  int64_t stride;
};

// c[r, v] = scale * sum over k < inner of a[r, k] b[k, v] + beta * d[r, v].
struct Product {
  Matrix a, b;
  int64_t inner;
  float scale, beta;
  Matrix d;  // of c's stride; read where beta is not 0
  Matrix c;
};

template <int R, int V>
void tile(const Product& p, int64_t row, int64_t column) {
  vf sums[R][V] = {};
  const float* a = p.a.data + row * p.a.stride;
  const float* b = p.b.data + column;
  for (int64_t k = 0; k < p.inner; ++k, b += p.b.stride) {
    vf right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf left = splat(a[r * p.a.stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fused(left, right[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = (row + r) * p.c.stride + column + v * kLanes;
      vf sum = sums[r][v] * p.scale;
      if (p.beta != 0.0f) sum = fused(splat(p.beta), load(p.d.data + at), sum);
      store(p.c.data + at, sum);
    }
  }
}

template <int R>
void row_of_tiles(const Product& p, int64_t row, int64_t column, int64_t columns) {
  for (; column < columns; column += kWide * kLanes) {
    switch ((columns - column) / kLanes) {
      case 1: tile<R, 1>(p, row, column); break;
      case 2: tile<R, 2>(p, row, column); break;
      case 3: tile<R, 3>(p, row, column); break;
      default: tile<R, kWide>(p, row, column);
    }
  }
}

// symmetric: columns before the row's own vector are left out.
void multiply(const Product& p, int64_t rows, int64_t columns, bool symmetric) {
  for (int64_t row = 0; row < rows; row += kTall) {
    const int64_t first = symmetric ? row / kLanes * kLanes : 0;
    switch (rows - row) {
      case 1: row_of_tiles<1>(p, row, first, columns); break;
      case 2: row_of_tiles<2>(p, row, first, columns); break;
      case 3: row_of_tiles<3>(p, row, first, columns); break;
      case 4: row_of_tiles<4>(p, row, first, columns); break;
      case 5: row_of_tiles<5>(p, row, first, columns); break;
      default: row_of_tiles<kTall>(p, row, first, columns);
    }
  }
}

// A block of kLanes x kLanes, transposed.
SAMOE_INLINE void transpose_block(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(__AVX512F__)
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + 2 + j]);
      r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0x88);
      t[i + 4 + j] = _mm512_shuffle_f32x4(r[i + j], r[i + 4 + j], 0xdd);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88));
    _mm512_storeu_ps(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(t[j], t[8 + j], 0xdd));
  }
#else
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// [rows, columns] to [columns, rows], both complete blocks: a stride is the other's number of rows.
void transpose(const Matrix& from, const Matrix& to) {
  const int64_t rows = to.stride, columns = from.stride;
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) transpose_block(from.data + i * columns + j, columns, to.data + j * rows + i, rows);
}

// Fills the blocks below the diagonal of a symmetric [size, size].
void mirror(const Matrix& x) {
  const int64_t size = x.stride;
  for (int64_t i = 0; i < size; i += kLanes)
    for (int64_t j = i + kLanes; j < size; j += kLanes)
      transpose_block(x.data + i * size + j, size, x.data + j * size + i, size);
}

// The matrices that one thread works on. m is the smaller padded dim of x, n the larger.
struct Work {
  int64_t m, n;
  Matrix x, next;                            // [m, n]
  Matrix turned;                             // x's transpose [n, m]
  Matrix gram, poly, product, half, spare;   // [m, m]

  static int64_t num_floats(int64_t m, int64_t n) { return 3 * m * n + 5 * m * m; }

  Work(float* memory, int64_t m, int64_t n) : m(m), n(n) {
    const auto take = [&](int64_t rows, int64_t stride) {
      const Matrix taken{memory, stride};
      memory += rows * stride;
      return taken;
    };
    x = take(m, n), next = take(m, n), turned = take(n, m);
    for (Matrix* square : {&gram, &poly, &product, &half, &spare}) *square = take(m, m);
  }
};

// One matrix.
void one(const NewtonSchulz& a, const float* in, float* out, float* memory) {
  const bool tall = a.rows > a.columns;
  const int64_t small = tall ? a.columns : a.rows, m = padded(small), n = padded(tall ? a.rows : a.columns);
  Work w(memory, m, n);
  if (m * n != a.rows * a.columns) memset(memory, 0, static_cast<size_t>(Work::num_floats(m, n)) * sizeof(float));
  const Matrix& copied = tall ? w.turned : w.x;
  for (int64_t r = 0; r < a.rows; ++r)
    memcpy(copied.data + r * copied.stride, in + r * a.columns, static_cast<size_t>(a.columns) * sizeof(float));
  if (tall) transpose(w.turned, w.x);
  double square = 0.0;
  for (int64_t i = 0; i < m * n; i += kLanes) {
    const vf v = load(w.x.data + i);
    square += sum_lanes(v * v);
  }
  const float norm = static_cast<float>(std::sqrt(square)), inverse = 1.0f / (norm > a.epsilon ? norm : a.epsilon);
  for (int64_t i = 0; i < m * n; i += kLanes) store(w.x.data + i, load(w.x.data + i) * inverse);
  // to = scale * left right + beta * added, all symmetric.
  const auto symmetric = [&](const Matrix& left, const Matrix& right, float scale, float beta, const Matrix& added, const Matrix& to) {
    multiply({left, right, small, scale, beta, added, to}, small, m, true);
    mirror(to);
  };
  for (int step = 0; step < a.num_steps; ++step) {
    const int of_run = step % a.steps_at_once;
    if (of_run == 0) {
      transpose(w.x, w.turned);
      multiply({w.x, w.turned, n, 1.0f, 0.0f, {}, w.gram}, small, m, true);
      mirror(w.gram);
    }
    symmetric(w.gram, w.gram, a.c, a.b, w.gram, w.poly);
    const bool is_last = of_run + 1 == a.steps_at_once || step + 1 == a.num_steps;
    if (of_run > 0) {
      symmetric(w.poly, w.product, 1.0f, a.a, w.product, w.spare);
      std::swap(w.product, w.spare);
    } else if (!is_last) {
      memcpy(w.product.data, w.poly.data, static_cast<size_t>(m * m) * sizeof(float));
      for (int64_t i = 0; i < small; ++i) w.product.data[i * m + i] += a.a;
    }
    if (is_last) {
      const Matrix& left = of_run > 0 ? w.product : w.poly;
      multiply({left, w.x, small, 1.0f, of_run > 0 ? 0.0f : a.a, w.x, w.next}, small, n, false);
      std::swap(w.x, w.next);
    } else {
      symmetric(w.poly, w.gram, 1.0f, a.a, w.gram, w.half);
      symmetric(w.poly, w.half, 1.0f, a.a, w.half, w.gram);
    }
  }
  if (tall) transpose(w.x, w.turned);
  const Matrix& result = tall ? w.turned : w.x;
  for (int64_t r = 0; r < a.rows; ++r)
    for (int64_t k = 0; k < a.columns; ++k) out[r * a.columns + k] = result.data[r * result.stride + k] * a.factor;
}

}  // namespace

void newton_schulz(const NewtonSchulz& a) {
  const int64_t m = padded(a.rows < a.columns ? a.rows : a.columns), n = padded(a.rows < a.columns ? a.columns : a.rows);
  const ThreadFloats memory(a.num_threads, Work::num_floats(m, n));
#pragma omp parallel num_threads(a.num_threads)
  {
    float* const own = memory.own();
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.num; ++i) one(a, a.x + i * a.rows * a.columns, a.out + i * a.rows * a.columns, own);
  }
}

}  // namespace SAMOE_ISA
}  // namespace cpu
}  // namespace samoe

// gated_delta.chunk: sizes, scratch and small matrix helpers that forward and backward share. All in float32.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "gemm.h"
#include "spread.h"

namespace grpo {

constexpr int64_t CHUNK = 64;  // most tokens of a chunk
constexpr int64_t HALF = 32;   // rows of a lower triangular product that go together

template <class T>
struct DeltaHeads {
  const T* data;
  ptrdiff_t token, head;
};
template <class T>
struct DeltaChunks {
  DeltaHeads<T> q, k, v;
  const float *g, *beta;  // [tokens, K]
  const int32_t* ends;    // [segments + 1]
  int64_t segments, H, K, D, E;
  float scale;
  int64_t rep() const { return K / H; }
  int64_t d() const { return (D + 15) / 16 * 16; }  // widths in scratch, padded by zeros
  int64_t e() const { return (E + 15) / 16 * 16; }
};
template <class T>
struct DeltaGrads {
  DeltaHeads<T> o;
  const float *last, *before;  // last may be null
  T *dq, *dk, *dv;             // contiguous
  float *dg, *dbeta, *initial;  // initial may be null
};

template <class T>
void delta_forward(const DeltaChunks<T>& a, const float* initial, T* o, float* last, float* before);
template <class T>
void delta_backward(const DeltaChunks<T>& a, const DeltaGrads<T>& g);

static inline int64_t chunks_of(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

// First chunk of each segment, then their number.
static inline std::vector<int64_t> chunk_starts(const int32_t* ends, int64_t segments) {
  std::vector<int64_t> starts(segments + 1, 0);
  for (int64_t s = 0; s < segments; ++s) starts[s + 1] = starts[s] + chunks_of(ends[s + 1] - ends[s]);
  return starts;
}

// `n` rows of `width` values as float32 [rows][padded], times `scale`; zeros elsewhere.
template <class T>
static inline void widen_rows(const T* x, ptrdiff_t stride, int64_t n, int64_t rows, int64_t width,
                              int64_t padded, float scale, float* out) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < rows; ++i, x += stride, out += padded)
    for (int64_t j = 0; j < padded; j += 16)
      _mm512_storeu_ps(out + j, i < n ? _mm512_mul_ps(factor, load(x + j, first(width - j)))
                                      : _mm512_setzero_ps());
}

template <class T>
static inline void narrow_rows(const float* x, ptrdiff_t x_row, int64_t n, int64_t width, T* out,
                               ptrdiff_t stride, float scale = 1.f) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; ++i, x += x_row, out += stride)
    each16(0, width, [&](int64_t j, auto m) { store(out + j, _mm512_mul_ps(factor, load(x + j, m)), m); });
}

// out[j][i] = x[i][j]; both sizes are multiples of 16.
static inline void transpose(const float* x, ptrdiff_t x_row, int64_t m, int64_t n, float* out,
                             ptrdiff_t out_row) {
  for (int64_t i = 0; i < m; i += 16)
    for (int64_t j = 0; j < n; j += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) r[l] = _mm512_loadu_si512(x + (i + l) * x_row + j);
      transpose16(r);
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) _mm512_storeu_si512(out + (j + l) * out_row + i, r[l]);
    }
}

static inline float dot(const float* x, const float* y, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < n; j += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + j), _mm512_loadu_ps(y + j), sum);
  return _mm512_reduce_add_ps(sum);
}

// y += factor x
static inline void add_row(float* y, const float* x, float factor, int64_t n) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < n; j += 16)
    _mm512_storeu_ps(y + j, _mm512_fmadd_ps(f, _mm512_loadu_ps(x + j), _mm512_loadu_ps(y + j)));
}

static inline void scale_row(float* y, const float* x, float factor, int64_t n) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int64_t j = 0; j < n; j += 16) _mm512_storeu_ps(y + j, _mm512_mul_ps(f, _mm512_loadu_ps(x + j)));
}

// Lower triangle of A B [rows, rows], in C with row length CHUNK; what is above it is arbitrary or left.
static inline void lower_product(int64_t rows, int64_t units, const float* a, const float* b, float* c) {
  for (int64_t i = 0; i < rows; i += HALF)
    gemm<false>(std::min(HALF, rows - i), std::min(rows, i + HALF), units, a + i * units, units, 1, b, CHUNK,
                c + i * CHUNK, CHUNK);
}

// C [rows, n] += L B with L lower triangular [rows][CHUNK], zeros above the diagonal.
static inline void add_lower(int64_t rows, int64_t n, const float* l, const float* b, float* c) {
  for (int64_t i = 0; i < rows; i += HALF)
    gemm<true>(std::min(HALF, rows - i), n, std::min(rows, i + HALF), l + i * CHUNK, CHUNK, 1, b, n,
               c + i * n, n);
}

// C [rows, n] += L^T B.
static inline void add_lower_transposed(int64_t rows, int64_t n, const float* l, const float* b, float* c) {
  for (int64_t i = 0; i < rows; i += HALF)
    gemm<true>(std::min(HALF, rows - i), n, rows - i, l + i * CHUNK + i, 1, CHUNK, b + i * n, n, c + i * n, n);
}

// X of (I - N) X = B in place of B [rows, n]; N is strictly lower triangular.
static inline void solve(int64_t rows, int64_t n, const float* N, float* x) {
  for (int64_t block = 0; block < rows / 16; ++block) {
    const int64_t b = 16 * block;
    if (b) gemm<true>(16, n, b, N + b * CHUNK, CHUNK, 1, x, n, x + b * n, n);
    for (int64_t i = b + 1; i < b + 16; ++i)
      for (int64_t j = 0; j < n; j += 16) {
        __m512 sum = _mm512_loadu_ps(x + i * n + j);
        for (int64_t l = b; l < i; ++l)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(N[i * CHUNK + l]), _mm512_loadu_ps(x + l * n + j), sum);
        _mm512_storeu_ps(x + i * n + j, sum);
      }
  }
}

// X of (I - N)^T X = B in place of B.
static inline void solve_transposed(int64_t rows, int64_t n, const float* N, float* x) {
  for (int64_t b = rows - 16; b >= 0; b -= 16) {
    if (b + 16 < rows)
      gemm<true>(16, n, rows - b - 16, N + (b + 16) * CHUNK + b, 1, CHUNK, x + (b + 16) * n, n, x + b * n, n);
    for (int64_t i = b + 14; i >= b; --i)
      for (int64_t j = 0; j < n; j += 16) {
        __m512 sum = _mm512_loadu_ps(x + i * n + j);
        for (int64_t l = i + 1; l < b + 16; ++l)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(N[l * CHUNK + i]), _mm512_loadu_ps(x + l * n + j), sum);
        _mm512_storeu_ps(x + i * n + j, sum);
      }
  }
}

// A chunk's decays: c is the cumulative log decay, in whole numbers and fractions. A few tokens of strong
// decay make c so large that float32 would lose the small differences after them.
struct Decays {
  float whole[CHUNK], part[CHUNK], start[CHUNK], rest[CHUNK], beta[CHUNK];  // exp(c), exp(c_last - c)
  float fade;                                                              // exp(c_last)

  void fill(const float* g, const float* b, ptrdiff_t stride, int64_t n, int64_t rows) {
    double total = 0;
    for (int64_t i = 0; i < rows; ++i) {
      if (i < n) total += g[i * stride];
      const double floor = std::floor(total);
      whole[i] = (float)floor, part[i] = (float)(total - floor);
      beta[i] = i < n ? b[i * stride] : 0.f;
    }
    const float last_whole = whole[rows - 1], last_part = part[rows - 1];
    for (int64_t i = 0; i < rows; i += 16) {
      const __m512 w = _mm512_loadu_ps(whole + i), p = _mm512_loadu_ps(part + i);
      _mm512_storeu_ps(start + i, exp512(_mm512_add_ps(w, p)));
      _mm512_storeu_ps(rest + i, exp512(_mm512_add_ps(_mm512_sub_ps(_mm512_set1_ps(last_whole), w),
                                                      _mm512_sub_ps(_mm512_set1_ps(last_part), p))));
    }
    fade = start[rows - 1];
  }

  // exp(c_i - c_j) for j = at .. at + 15, 0 for j > i.
  __m512 between(int64_t i, int64_t at) const {
    const __m512 x = _mm512_add_ps(_mm512_sub_ps(_mm512_set1_ps(part[i]), _mm512_loadu_ps(part + at)),
                                   _mm512_sub_ps(_mm512_set1_ps(whole[i]), _mm512_loadu_ps(whole + at)));
    return _mm512_maskz_mov_ps(first(i + 1 - at), exp512(x));
  }
};

// What all value heads of a key head have in common in a chunk, and room for one of them.
struct DeltaRoom {
  Scratch<float> kept;
  float *k, *q, *k_t, *gram, *scores;         // [rows][d], [d][CHUNK], [rows][CHUNK]
  float *decay, *system, *weights, *x, *out;  // [rows][CHUNK], [rows][e]
  float *scaled;                              // [rows][d]
  Decays decays;
  float* more;  // `extra` floats

  void take(int64_t d, int64_t e, int64_t extra) {
    const int64_t square = CHUNK * CHUNK, wide = CHUNK * d, tall = CHUNK * e;
    float* at = kept.get(4 * wide + 2 * tall + 5 * square + extra);
    const auto next = [&](int64_t size) { return std::exchange(at, at + size); };
    k = next(wide), q = next(wide), k_t = next(wide), scaled = next(wide);
    gram = next(square), scores = next(square), decay = next(square), system = next(square);
    weights = next(square), x = next(tall), out = next(tall), more = at;
  }
};

struct Chunk {
  int64_t token, n, rows;  // first token, tokens, and those padded to a multiple of 16
};

template <class T>
static inline void open_chunk(const DeltaChunks<T>& a, const Chunk& c, int64_t head, DeltaRoom& r) {
  const int64_t d = a.d();
  widen_rows(a.k.data + c.token * a.k.token + head * a.k.head, a.k.token, c.n, c.rows, a.D, d, 1.f, r.k);
  widen_rows(a.q.data + c.token * a.q.token + head * a.q.head, a.q.token, c.n, c.rows, a.D, d, a.scale, r.q);
  transpose(r.k, d, c.rows, d, r.k_t, CHUNK);
  lower_product(c.rows, d, r.k, r.k_t, r.gram);
  lower_product(c.rows, d, r.q, r.k_t, r.scores);
}

// decay, system = -tril(beta gram decay, -1), weights = tril(scores decay); then x = v - exp(c) k M, and new
// in r.x of  new = beta (v - exp(c) k M) + system new;  `raw`, where given, keeps v - exp(c) k M.
template <class T>
static inline void open_head(const DeltaChunks<T>& a, const Chunk& c, int64_t head, const float* state,
                             DeltaRoom& r, float* raw) {
  const int64_t d = a.d(), e = a.e();
  r.decays.fill(a.g + c.token * a.K + head, a.beta + c.token * a.K + head, a.K, c.n, c.rows);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.rows; j += 16) {
      const int64_t at = i * CHUNK + j;
      const __m512 zero = _mm512_setzero_ps(), fall = j > i ? zero : r.decays.between(i, j);
      const __m512 gram = j > i ? zero : _mm512_loadu_ps(r.gram + at);
      const __m512 strong = _mm512_mul_ps(_mm512_set1_ps(-r.decays.beta[i]), fall);
      _mm512_storeu_ps(r.decay + at, fall);
      _mm512_storeu_ps(r.system + at, _mm512_maskz_mul_ps(first(i - j), strong, gram));
      _mm512_storeu_ps(r.weights + at, j > i ? zero : _mm512_mul_ps(fall, _mm512_loadu_ps(r.scores + at)));
    }
  gemm<false>(c.rows, e, d, r.k, d, 1, state, e, r.x, e);
  const T* v = a.v.data + c.token * a.v.token + head * a.v.head;
  for (int64_t i = 0; i < c.rows; ++i) {
    const __m512 start = _mm512_set1_ps(r.decays.start[i]), beta = _mm512_set1_ps(r.decays.beta[i]);
    for (int64_t j = 0; j < e; j += 16) {
      const __m512 value = i < c.n ? load(v + i * a.v.token + j, first(a.E - j)) : _mm512_setzero_ps();
      const __m512 x = _mm512_fnmadd_ps(start, _mm512_loadu_ps(r.x + i * e + j), value);
      if (raw) _mm512_storeu_ps(raw + i * e + j, x);
      _mm512_storeu_ps(r.x + i * e + j, _mm512_mul_ps(beta, x));
    }
  }
  solve(c.rows, e, r.system, r.x);
}

}  // namespace grpo

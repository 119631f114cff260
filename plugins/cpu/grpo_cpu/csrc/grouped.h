// Matrix products of the experts, in bf16 and float32. All operands are read in units of 32 bits along the
// summed dimension: a pair of bf16, or one float. A comes one unit at a time (any strides), B as rows of
// lanes, so that rows of a weight serve as A without being packed.
#pragma once
#include "gemm.h"

namespace grpo {

using unit = uint32_t;
template <class T>
constexpr int64_t PER_UNIT = sizeof(unit) / sizeof(T);
constexpr int64_t LANES = 64;  // columns of B that one call takes at most

template <class T>
static inline const unit* units(const T* p) { return reinterpret_cast<const unit*>(p); }

template <class T>
static inline __m512 multiply_add(__m512i a, __m512i b, __m512 acc) {
  if constexpr (PER_UNIT<T> == 2) return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc);
}

static inline __m512i broadcast(const unit* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return _mm512_set1_epi32(bits);
}

template <class T>
static inline __m512 rounded(__m512 x) {
  if constexpr (PER_UNIT<T> == 2) return round_bf16(x);
  return x;
}

// A B in registers, of MR rows and NV vectors of columns; then finish(row, sums) for every row.
template <class T, int MR, int NV, class Finish>
static inline __attribute__((always_inline)) void group_tile(int64_t kp, const unit* a, ptrdiff_t a_row,
                                                             ptrdiff_t a_step, const unit* b, ptrdiff_t b_step,
                                                             int64_t row, const Finish& finish) {
  __m512 acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < kp; ++k, a += a_step, b += b_step) {
    // Weights come from memory as A, and the next rows of them are fetched on the way.
    if (a_step == 1 && k % 16 == 0)
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) _mm_prefetch((const char*)(a + (MR + i) * a_row), _MM_HINT_T0);
    __m512i column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = _mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512i x = broadcast(a + i * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add<T>(x, column[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) finish(row + i, acc[i]);
}

template <class T, int MR, int NV, class Finish>
static void group_rows(int64_t m, int64_t kp, const unit* a, ptrdiff_t a_row, ptrdiff_t a_step, const unit* b,
                       ptrdiff_t b_step, int64_t row, const Finish& finish) {
  for (; m >= MR; m -= MR, a += MR * a_row, row += MR)
    group_tile<T, MR, NV>(kp, a, a_row, a_step, b, b_step, row, finish);
  if constexpr (MR > 1)
    if (m > 0) group_rows<T, (MR + 1) / 2, NV>(m, kp, a, a_row, a_step, b, b_step, row, finish);
}

// finish(i, sums) for rows i of A B, which has m rows and n <= LANES columns; `sums` is an array of vectors of
// 16 columns. B has whole vectors. Strides of A and B count units.
template <class T, class Finish>
static void group_finish(int64_t m, int64_t n, int64_t kp, const unit* a, ptrdiff_t a_row, ptrdiff_t a_step,
                         const unit* b, ptrdiff_t b_step, const Finish& finish) {
  if (n > 48)
    group_rows<T, 6, 4>(m, kp, a, a_row, a_step, b, b_step, 0, finish);
  else if (n > 32)
    group_rows<T, 8, 3>(m, kp, a, a_row, a_step, b, b_step, 0, finish);
  else if (n > 16)
    group_rows<T, 12, 2>(m, kp, a, a_row, a_step, b, b_step, 0, finish);
  else
    group_rows<T, 16, 1>(m, kp, a, a_row, a_step, b, b_step, 0, finish);
}

// C [m, n] = A B.
template <class T, class O>
static void group_gemm(int64_t m, int64_t n, int64_t kp, const unit* a, ptrdiff_t a_row, ptrdiff_t a_step,
                       const unit* b, ptrdiff_t b_step, O* c, ptrdiff_t c_row) {
  group_finish<T>(m, n, kp, a, a_row, a_step, b, b_step, [&](int64_t i, const auto& sums) {
    constexpr int NV = sizeof(sums) / sizeof(sums[0]);
    O* to = c + i * c_row;
#pragma GCC unroll 4
    for (int j = 0; j < NV - 1; ++j) store(to + 16 * j, sums[j]);
    if (n == 16 * NV)
      store(to + 16 * (NV - 1), sums[NV - 1]);
    else
      store(to + 16 * (NV - 1), sums[NV - 1], first(n - 16 * (NV - 1)));
  });
}

constexpr int64_t AHEAD = 16;  // rows between those being packed and those being fetched

// Rows of x [count, n] (row stride in elements) to [ceil(count / PER_UNIT)][padded] units: bf16 rows come in
// pairs, an odd last one is paired with zeros. Columns n..padded - 1 are zeros; padded is a multiple of 16.
template <class T>
static void pack_rows(const T* x, ptrdiff_t stride, int64_t count, int64_t n, unit* out, int64_t padded) {
  for (int64_t k = 0; k < count; k += PER_UNIT<T>, out += padded) {
    const T* low = x + k * stride;
    // A panel of a wide matrix: a short run of each row, which the CPU does not foresee.
    for (int64_t j = 0; j < n; j += 64 / (int64_t)sizeof(T))
      for (int64_t p = 0; p < PER_UNIT<T>; ++p)
        _mm_prefetch((const char*)(low + (AHEAD + p) * stride + j), _MM_HINT_T0);
    for (int64_t j = 0; j < padded; j += 16) {
      const __mmask16 m = first(n - j);
      if constexpr (PER_UNIT<T> == 2) {
        const __m256i a = _mm256_maskz_loadu_epi16(m, low + j);
        const __mmask16 next = k + 1 < count ? m : (__mmask16)0;
        const __m256i b = _mm256_maskz_loadu_epi16(next, low + stride + j);
        _mm512_storeu_si512(out + j, interleave(a, b));
      } else {
        _mm512_storeu_si512(out + j, _mm512_maskz_loadu_epi32(m, low + j));
      }
    }
  }
}

// Rows of x [count, kp units] to columns: [kp][padded] units; lanes count..padded - 1 are zeros. Rows of the
// result are `out_row` units apart.
static inline void pack_columns(const unit* x, ptrdiff_t stride, int64_t count, int64_t kp, unit* out,
                                int64_t padded, ptrdiff_t out_row) {
  for (int64_t lane = 0; lane < padded; lane += 16)
    for (int64_t k = 0; k < kp; k += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = lane + i < count ? _mm512_maskz_loadu_epi32(first(kp - k), x + (lane + i) * stride + k)
                                : _mm512_setzero_si512();
      transpose16(r);
      const int64_t rows = std::min<int64_t>(16, kp - k);
      for (int64_t i = 0; i < rows; ++i) _mm512_storeu_si512(out + (k + i) * out_row + lane, r[i]);
    }
}

// Float32 c [m, lanes] (row stride `c_row`) to rows of y: y[lane][i] = c[i][lane] for `n` lanes.
template <class T>
static void store_columns(const float* c, ptrdiff_t c_row, int64_t m, int64_t n, T* y, ptrdiff_t y_row) {
  for (int64_t lane = 0; lane < n; lane += 16)
    for (int64_t i = 0; i < m; i += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k)
        r[k] = i + k < m ? _mm512_loadu_si512(c + (i + k) * c_row + lane) : _mm512_setzero_si512();
      transpose16(r);
      const int64_t rows = std::min<int64_t>(16, n - lane);
      for (int64_t k = 0; k < rows; ++k) {
        const __m512 x = _mm512_castsi512_ps(r[k]);
        if (m - i >= 16)
          store(y + (lane + k) * y_row + i, x);
        else
          store(y + (lane + k) * y_row + i, x, first(m - i));
      }
    }
}

// The sum of each vector's 16 lanes, as lane i for vector i: a tree, for a third of what 16 sums cost.
static inline __m512 sums_of(const __m512 (&v)[16]) {
  __m512 pair[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(pair[2 * i]), high = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    pair[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x44),
                            _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88),
                       _mm512_shuffle_f32x4(pair[0], pair[1], 0xdd));
}

constexpr int64_t FETCHED = 8;  // rows of weights between those multiplied and those fetched

// out[r][g] = <x row r, w row g> for NR rows of x and `m` of w: nothing is packed, for few rows.
template <class T, int NR, int G>
static void dots(const unit* x, ptrdiff_t x_row, const unit* w, ptrdiff_t w_row, int64_t m, int64_t kp,
                 float* out, ptrdiff_t out_row) {
  int64_t g = 0;
  for (; g + G <= m; g += G, w += G * w_row) {
    __m512 acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_ps();
    each16(0, kp, [&](int64_t k, auto lanes) {
      __m512i weight[G];
#pragma GCC unroll 4
      for (int j = 0; j < G; ++j) {
        _mm_prefetch((const char*)(w + (FETCHED + j) * w_row + k), _MM_HINT_T0);
        weight[j] = _mm512_maskz_loadu_epi32(lanes, w + j * w_row + k);
      }
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
        const __m512i row = _mm512_maskz_loadu_epi32(lanes, x + r * x_row + k);
#pragma GCC unroll 4
        for (int j = 0; j < G; ++j) acc[r * G + j] = multiply_add<T>(row, weight[j], acc[r * G + j]);
      }
    });
    alignas(64) float sums[16];
    _mm512_store_ps(sums, sums_of(acc));
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) std::memcpy(out + r * out_row + g, sums + r * G, G * sizeof(float));
  }
  if constexpr (G > 1)
    if (g < m) dots<T, NR, 1>(x, x_row, w, w_row, m - g, kp, out + g, out_row);
}

constexpr int64_t FEW = 8;  // rows that `few_dots` takes at most
template <class T>
static void few_dots(int64_t n, const unit* x, ptrdiff_t x_row, const unit* w, ptrdiff_t w_row, int64_t m,
                     int64_t kp, float* out, ptrdiff_t out_row) {
  switch (n) {
    case 1: return dots<T, 1, 4>(x, x_row, w, w_row, m, kp, out, out_row);
    case 2: return dots<T, 2, 4>(x, x_row, w, w_row, m, kp, out, out_row);
    case 3: return dots<T, 3, 4>(x, x_row, w, w_row, m, kp, out, out_row);
    case 4: return dots<T, 4, 4>(x, x_row, w, w_row, m, kp, out, out_row);
    case 5: return dots<T, 5, 2>(x, x_row, w, w_row, m, kp, out, out_row);
    case 6: return dots<T, 6, 2>(x, x_row, w, w_row, m, kp, out, out_row);
    case 7: return dots<T, 7, 2>(x, x_row, w, w_row, m, kp, out, out_row);
    case 8: return dots<T, 8, 2>(x, x_row, w, w_row, m, kp, out, out_row);
  }
}

}  // namespace grpo

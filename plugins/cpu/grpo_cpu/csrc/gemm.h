// Small matrix products in float32, of bf16 on vdpbf16ps or of float32. Operands are read in units of 32 bits
// along the summed dimension, a pair of bf16 or one float32: A one unit at a time (any strides), B as rows of
// [columns][UNIT] with the unit innermost.
#pragma once
#include "simd.h"

namespace grpo {

template <class T>
constexpr int64_t UNIT = 4 / (int64_t)sizeof(T);

template <class T>
static inline __m512i broadcast_unit(const T* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}

// acc + x * y over the 16 units, each summed within itself.
template <class T>
static inline __m512 multiply(__m512 acc, __m512i x, __m512i y) {
  if constexpr (sizeof(T) == 2)
    return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)y);
  else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), acc);
}

// acc[i][j] += A units 0..units-1 of row i times B columns 16 j .. 16 j + 15.
template <int MR, int NV, class T>
static inline __attribute__((always_inline)) void accumulate(
    __m512 (&acc)[MR][NV], const T* a, ptrdiff_t a_row, ptrdiff_t a_unit, const T* b, ptrdiff_t b_unit,
    int64_t units) {
  for (int64_t k = 0; k < units; ++k, a += a_unit, b += b_unit) {
    __m512i column[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) column[j] = _mm512_loadu_si512(b + 16 * UNIT<T> * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512i x = broadcast_unit(a + i * a_row);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = multiply<T>(acc[i][j], x, column[j]);
    }
  }
}

template <int MR, int NV, bool ADD, class T>
static inline void tile(const T* a, ptrdiff_t a_row, ptrdiff_t a_unit, const T* b, ptrdiff_t b_unit,
                        int64_t units, float* c, ptrdiff_t c_row) {
  __m512 acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j)
      acc[i][j] = ADD ? _mm512_loadu_ps(c + i * c_row + 16 * j) : _mm512_setzero_ps();
  accumulate<MR, NV>(acc, a, a_row, a_unit, b, b_unit, units);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(c + i * c_row + 16 * j, acc[i][j]);
}

template <int MR, int NV, bool ADD, class T>
static void rows(int64_t m, const T* a, ptrdiff_t a_row, ptrdiff_t a_unit, const T* b, ptrdiff_t b_unit,
                 int64_t units, float* c, ptrdiff_t c_row) {
  for (; m >= MR; m -= MR, a += MR * a_row, c += MR * c_row)
    tile<MR, NV, ADD>(a, a_row, a_unit, b, b_unit, units, c, c_row);
  if constexpr (MR > 1)
    if (m > 0) rows<(MR + 1) / 2, NV, ADD>(m, a, a_row, a_unit, b, b_unit, units, c, c_row);
}

// C [m, n] float32 (+)= A B; n is a multiple of 16; a_row, a_unit, b_unit, c_row are strides in elements.
template <bool ADD, class T>
static void gemm(int64_t m, int64_t n, int64_t units, const T* a, ptrdiff_t a_row, ptrdiff_t a_unit,
                 const T* b, ptrdiff_t b_unit, float* c, ptrdiff_t c_row) {
  for (; n >= 64; n -= 64, b += 64 * UNIT<T>, c += 64)
    rows<6, 4, ADD>(m, a, a_row, a_unit, b, b_unit, units, c, c_row);
  if (n >= 32) {
    rows<6, 2, ADD>(m, a, a_row, a_unit, b, b_unit, units, c, c_row);
    n -= 32, b += 32 * UNIT<T>, c += 32;
  }
  if (n > 0) rows<6, 1, ADD>(m, a, a_row, a_unit, b, b_unit, units, c, c_row);
}

// Two rows of 16 columns interleaved: (low[0], high[0], low[1], ...), as bf16.
static inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Rows 0..count-1 of x (row stride `stride`, n columns, n % 16 == 0) to units [rows / UNIT][n][UNIT]; what is
// missing of the last is zero. `padded` units are written.
static inline void pack_units(const bf16* x, ptrdiff_t stride, int64_t count, int64_t n, bf16* out,
                              int64_t padded) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t p = 0; p < padded; ++p, out += 2 * n) {
    const bf16 *low = x + 2 * p * stride, *high = low + stride;
    for (int64_t j = 0; j < n; j += 16) {
      const __m256i a = 2 * p < count ? _mm256_loadu_si256((const __m256i*)(low + j)) : zero;
      const __m256i b = 2 * p + 1 < count ? _mm256_loadu_si256((const __m256i*)(high + j)) : zero;
      _mm512_storeu_si512(out + 2 * j, interleave(a, b));
    }
  }
}

static inline void pack_units(const float* x, ptrdiff_t stride, int64_t count, int64_t n, float* out,
                              int64_t padded) {
  for (int64_t l = 0; l < padded; ++l, out += n)
    for (int64_t j = 0; j < n; j += 16)
      _mm512_storeu_ps(out + j, l < count ? _mm512_loadu_ps(x + l * stride + j) : _mm512_setzero_ps());
}

// A 16 x 16 transpose of 32-bit elements, in registers.
static inline void transpose16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Up to 32 rows of x (d columns, d % 32 == 0) to one block [d / UNIT][32][UNIT]: row l becomes column l. Columns
// that do not exist are zero up to a multiple of 16, and untouched after it.
template <class T>
static inline void pack_block(const T* x, ptrdiff_t stride, int64_t count, int64_t d, T* out) {
  constexpr int64_t U = UNIT<T>;
  for (int64_t half = 0; 16 * half < count; ++half)
    for (int64_t j = 0; j < d / U; j += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = half * 16 + i < count ? _mm512_loadu_si512(x + (half * 16 + i) * stride + j * U)
                                     : _mm512_setzero_si512();
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + ((j + i) * 32 + half * 16) * U, r[i]);
    }
}

}  // namespace grpo

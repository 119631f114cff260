// Small matrix products on vdpbf16ps. Both operands are read as pairs along the summed dimension: A as one
// 32-bit pair at a time (any strides), B as rows of [columns][2] with the pair innermost.
#pragma once
#include "simd.h"

namespace grpo {

static inline __m512bh broadcast_pair(const bf16* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

// acc[i][j] += A pairs 0..kp-1 of row i times B columns 16 j .. 16 j + 15.
template <int MR, int NV>
static inline __attribute__((always_inline)) void accumulate(
    __m512 (&acc)[MR][NV], const bf16* a, ptrdiff_t a_row, ptrdiff_t a_pair, const bf16* b, ptrdiff_t b_pair,
    int64_t kp) {
  for (int64_t k = 0; k < kp; ++k, a += a_pair, b += b_pair) {
    __m512bh column[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) column[j] = (__m512bh)_mm512_loadu_si512(b + 32 * j);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const __m512bh x = broadcast_pair(a + i * a_row);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], x, column[j]);
    }
  }
}

template <int MR, int NV, bool ADD>
static inline void tile(const bf16* a, ptrdiff_t a_row, ptrdiff_t a_pair, const bf16* b, ptrdiff_t b_pair,
                        int64_t kp, float* c, ptrdiff_t c_row) {
  __m512 acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j)
      acc[i][j] = ADD ? _mm512_loadu_ps(c + i * c_row + 16 * j) : _mm512_setzero_ps();
  accumulate<MR, NV>(acc, a, a_row, a_pair, b, b_pair, kp);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(c + i * c_row + 16 * j, acc[i][j]);
}

template <int MR, int NV, bool ADD>
static void rows(int64_t m, const bf16* a, ptrdiff_t a_row, ptrdiff_t a_pair, const bf16* b, ptrdiff_t b_pair,
                 int64_t kp, float* c, ptrdiff_t c_row) {
  for (; m >= MR; m -= MR, a += MR * a_row, c += MR * c_row)
    tile<MR, NV, ADD>(a, a_row, a_pair, b, b_pair, kp, c, c_row);
  if constexpr (MR > 1)
    if (m > 0) rows<(MR + 1) / 2, NV, ADD>(m, a, a_row, a_pair, b, b_pair, kp, c, c_row);
}

// C [m, n] float32 (+)= A B; n is a multiple of 32; a_row, a_pair, b_pair, c_row are strides in elements.
template <bool ADD>
static void gemm(int64_t m, int64_t n, int64_t kp, const bf16* a, ptrdiff_t a_row, ptrdiff_t a_pair,
                 const bf16* b, ptrdiff_t b_pair, float* c, ptrdiff_t c_row) {
  for (; n >= 64; n -= 64, b += 128, c += 64) rows<6, 4, ADD>(m, a, a_row, a_pair, b, b_pair, kp, c, c_row);
  if (n > 0) rows<6, 2, ADD>(m, a, a_row, a_pair, b, b_pair, kp, c, c_row);
}

// Two rows of 16 columns interleaved: (low[0], high[0], low[1], ...), as bf16.
static inline __m512i interleave(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Rows 0..count-1 of x (row stride `stride`, n columns, n % 16 == 0) to pairs [rows / 2][n][2]; an odd last
// row is paired with zeros. `padded` pairs are written.
static inline void pack_pairs(const bf16* x, ptrdiff_t stride, int64_t count, int64_t n, bf16* out,
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

// Up to 32 rows of x (d columns, d % 32 == 0) to one block [d / 2][32][2]: row l becomes column l.
static inline void pack_block(const bf16* x, ptrdiff_t stride, int64_t count, int64_t d, bf16* out) {
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t j = 0; j < d; j += 32) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = half * 16 + i < count ? _mm512_loadu_si512(x + (half * 16 + i) * stride + j)
            : _mm512_setzero_si512();
      transpose16(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (j / 2 + i) * 64 + half * 32, r[i]);
    }
}

}  // namespace grpo

// Rotary embedding and the per-head norm of one head of one token.
#pragma once
#include "simd.h"

namespace grpo {

// (x, y) of 16 pairs stored as (x0, y0, x1, y1, ...).
static inline void split_pairs(const bf16* p, __mmask16 m, __m512* x, __m512* y) {
  const __m512i both = _mm512_maskz_loadu_epi32(m, p);
  *x = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  *y = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xFFFF0000u)));
}

static inline void join_pairs(bf16* p, __mmask16 m, __m512 x, __m512 y) {
  const __m512i low = _mm512_cvtepu16_epi32(narrow(x)), high = _mm512_cvtepu16_epi32(narrow(y));
  const __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  if (m == 0xFFFF)
    _mm512_storeu_si512(p, both);
  else
    _mm512_mask_storeu_epi32(p, m, both);
}

static inline void split_pairs(const float* p, __mmask16 m, __m512* x, __m512* y) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const int64_t count = 2 * __builtin_popcount(m);
  const __m512 low = load(p, first(count)), high = load(p + 16, first(count - 16));
  *x = _mm512_permutex2var_ps(low, even, high);
  *y = _mm512_permutex2var_ps(low, odd, high);
}

static inline void join_pairs(float* p, __mmask16 m, __m512 x, __m512 y) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const int64_t count = 2 * __builtin_popcount(m);
  store(p, _mm512_permutex2var_ps(x, low, y), first(count));
  store(p + 16, _mm512_permutex2var_ps(x, high, y), first(count - 16));
}

// y = x turned by the angles (back by them with `inverse`); x and y may be the same. The first 2 * pairs of
// d dimensions turn, the rest are copied.
template <class T>
static inline void rotate_head(const T* x, T* y, const float* cos, const float* sin, int64_t d,
                               int64_t pairs, bool interleaved, bool inverse) {
  const __m512 sign = _mm512_set1_ps(inverse ? -1.f : 1.f);
  each16(0, pairs, [&](int64_t i, auto m) {
    const __m512 c = load(cos + i, m), s = _mm512_mul_ps(load(sin + i, m), sign);
    __m512 a, b;
    if (interleaved) {
      split_pairs(x + 2 * i, m, &a, &b);
    } else {
      a = load(x + i, m);
      b = load(x + pairs + i, m);
    }
    const __m512 u = _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s));
    const __m512 v = _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s));
    if (interleaved) {
      join_pairs(y + 2 * i, m, u, v);
    } else {
      store(y + i, u, m);
      store(y + pairs + i, v, m);
    }
  });
  if (x != y && 2 * pairs < d) std::memcpy(y + 2 * pairs, x + 2 * pairs, (d - 2 * pairs) * sizeof(T));
}

// RMS norm of one head, rounded as `norm.rms` rounds.
template <class T>
static inline void norm_head(const T* x, const T* w, T* y, int64_t d, float eps) {
  __m512 square = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __m512 v = load(x + i);
    square = _mm512_fmadd_ps(v, v, square);
  }
  const __m512 r = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(square) / (float)d + eps));
  for (int64_t i = 0; i < d; i += 16)
    store(y + i, _mm512_mul_ps(round_to<T>(_mm512_mul_ps(load(x + i), r)), load(w + i)));
}

}  // namespace grpo

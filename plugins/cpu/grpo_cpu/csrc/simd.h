// AVX-512 helpers. A bf16 value travels as its 16 bits.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

namespace grpo {

using bf16 = uint16_t;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

static inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
static inline __m512 load(const bf16* p, __mmask16 m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
static inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 load(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }

// Rounds to nearest even; NaN stays NaN, subnormals become zero.
static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline __m512 round_bf16(__m512 x) { return widen(narrow(x)); }
// Rounded as a value of type T is stored.
template <class T>
static inline __m512 round_to(__m512 x) {
  if constexpr (sizeof(T) == 2)
    return round_bf16(x);
  else
    return x;
}
static inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, narrow(x)); }
static inline void store(bf16* p, __m512 x, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, narrow(x)); }
static inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
static inline void store(float* p, __m512 x, __mmask16 m) { _mm512_mask_storeu_ps(p, m, x); }

static inline float to_float(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline float to_float(float x) { return x; }

// Lanes 0..n-1 (n clamped to 0..16).
static inline __mmask16 first(int64_t n) {
  return n >= 16 ? (__mmask16)0xFFFF : n <= 0 ? (__mmask16)0 : (__mmask16)((1u << n) - 1u);
}

// All 16 lanes, as a type: masked loads and stores cost several plain ones on some CPUs.
struct All {
  constexpr operator __mmask16() const { return 0xFFFF; }
};
template <class T>
static inline __m512 load(const T* p, All) { return load(p); }
template <class T>
static inline void store(T* p, __m512 x, All) { store(p, x); }

// body(i, lanes) for i = from, from + 16, ... below to; `lanes` is All but for a short end.
template <class Body>
static inline __attribute__((always_inline)) void each16(int64_t from, int64_t to, const Body& body) {
  int64_t i = from;
  for (; i + 16 <= to; i += 16) body(i, All{});
  if (i < to) body(i, first(to - i));
}

// Fetches what a pass over rows reads some 2048 elements later. Activations come from memory in several streams at a
// time, of which the CPU's own prefetcher keeps too little in flight.
template <class T>
static inline void fetch(const T* at) { _mm_prefetch((const char*)(at + 2048), _MM_HINT_T0); }

// exp to 2 ulp for x <= 88; 0 below -104, NaN stays NaN.
static inline __m512 exp512(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-110.f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860682030941723e-6f), r);
  __m512 y = _mm512_set1_ps(1.f / 720.f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f / 120.f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f / 24.f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f / 6.f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(y, n);
}

// 1 / (1 + exp(-x)), to float32 accuracy at both ends.
static inline __m512 sigmoid512(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  const __m512 e = exp512(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mask_mov_ps(one, negative, e), _mm512_add_ps(one, e));
}

// A 64-byte aligned array that grows and is never shared between threads.
template <class T>
class Scratch {
 public:
  T* get(size_t count) {
    if (count > size_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace grpo

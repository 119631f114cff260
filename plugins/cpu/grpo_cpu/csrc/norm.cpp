// norm.rms: forward with an optional residual, and backward.
#include <ATen/Parallel.h>

#include <vector>

#include "kernels.h"
#include "simd.h"

namespace grpo {
namespace {

// Weight of 16 columns as the factor of the normed input.
template <class T>
inline __m512 gain(const T* w, __mmask16 m, bool zero_centered) {
  const __m512 x = load(w, m);
  return zero_centered ? _mm512_add_ps(x, _mm512_set1_ps(1.f)) : x;
}

template <class T>
void norm_row(const Norm<T>& a, int64_t row) {
  const T* x = a.x + row * a.width;
  const T* source = x;
  __m512 square = _mm512_setzero_ps();
  if (a.residual) {
    const T* r = a.residual + row * a.width;
    T* total = a.total + row * a.width;
    each16(0, a.width, [&](int64_t i, auto m) {
      fetch(x + i), fetch(r + i);
      const __m512 sum = round_to<T>(_mm512_add_ps(load(x + i, m), load(r + i, m)));
      store(total + i, sum, m);
      square = _mm512_fmadd_ps(sum, sum, square);
    });
    source = total;
  } else {
    each16(0, a.width, [&](int64_t i, auto m) {
      fetch(x + i);
      const __m512 v = load(x + i, m);
      square = _mm512_fmadd_ps(v, v, square);
    });
  }
  const float inverse = 1.f / std::sqrt(_mm512_reduce_add_ps(square) / (float)a.width + a.eps);
  if (a.inverse) a.inverse[row] = inverse;
  const __m512 factor = _mm512_set1_ps(inverse);
  each16(0, a.width, [&](int64_t i, auto m) {
    const __m512 normed = round_to<T>(_mm512_mul_ps(load(source + i, m), factor));
    store(a.y + row * a.width + i, _mm512_mul_ps(normed, gain(a.w + i, m, a.zero_centered)), m);
  });
}

// With n = total * inverse: dx = inverse * (g - n * mean(g * n)) + dtotal, g = dy * w; dw += dy * n.
template <class T>
void norm_row_backward(const NormGrad<T>& a, int64_t row, float* dw) {
  const T *x = a.total + row * a.width, *dy = a.dy + row * a.width;
  const __m512 inverse = _mm512_set1_ps(a.inverse[row]);
  __m512 dot = _mm512_setzero_ps();
  each16(0, a.width, [&](int64_t i, auto m) {
    fetch(dy + i), fetch(x + i);
    if (a.dtotal) fetch(a.dtotal + row * a.width + i);
    const __m512 g = load(dy + i, m), n = _mm512_mul_ps(load(x + i, m), inverse);
    store(dw + i, _mm512_fmadd_ps(g, round_to<T>(n), load(dw + i, m)), m);
    dot = _mm512_fmadd_ps(_mm512_mul_ps(g, gain(a.w + i, m, a.zero_centered)), n, dot);
  });
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / (float)a.width);
  each16(0, a.width, [&](int64_t i, auto m) {
    const __m512 g = _mm512_mul_ps(load(dy + i, m), gain(a.w + i, m, a.zero_centered));
    const __m512 n = _mm512_mul_ps(load(x + i, m), inverse);
    __m512 dx = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(n, mean, g));
    if (a.dtotal) dx = _mm512_add_ps(dx, load(a.dtotal + row * a.width + i, m));
    store(a.dx + row * a.width + i, dx, m);
  });
}

}  // namespace

template <class T>
void norm_forward(const Norm<T>& a) {
  at::parallel_for(0, a.rows, std::max<int64_t>(1, 16384 / a.width), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) norm_row(a, row);
  });
}

template <class T>
void norm_backward(const NormGrad<T>& a) {
  // Pieces of a fixed size, added up in their order: the sum does not depend on the number of threads.
  constexpr int64_t PIECE = 64;
  const int64_t pieces = (a.rows + PIECE - 1) / PIECE;
  std::vector<float> partial(pieces * a.width, 0.f);
  at::parallel_for(0, pieces, 1, [&](int64_t from, int64_t to) {
    for (int64_t row = from * PIECE; row < std::min(a.rows, to * PIECE); ++row)
      norm_row_backward(a, row, partial.data() + row / PIECE * a.width);
  });
  at::parallel_for(0, (a.width + 15) / 16, 16, [&](int64_t from, int64_t to) {
    each16(from * 16, std::min(a.width, to * 16), [&](int64_t i, auto m) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t p = 0; p < pieces; ++p)
        sum = _mm512_add_ps(sum, load(partial.data() + p * a.width + i, m));
      store(a.dw + i, sum, m);
    });
  });
}

template void norm_forward(const Norm<bf16>&);
template void norm_forward(const Norm<float>&);
template void norm_backward(const NormGrad<bf16>&);
template void norm_backward(const NormGrad<float>&);

}  // namespace grpo

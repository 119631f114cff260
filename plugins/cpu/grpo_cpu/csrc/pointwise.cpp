// mlp.swiglu and rope.apply, forward and backward.
#include <ATen/Parallel.h>

#include "kernels.h"
#include "rotary.h"

namespace grpo {

template <class T>
void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t width) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / width), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T *gate = gate_up + row * 2 * width, *up = gate + width;
      each16(0, width, [&](int64_t i, auto m) {
        fetch(gate + i), fetch(up + i);
        const __m512 g = load(gate + i, m);
        store(y + row * width + i, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid512(g)), load(up + i, m)), m);
      });
    }
  });
}

// d silu(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <class T>
void swiglu_backward(const T* gate_up, const T* dy, T* dgate_up, int64_t rows, int64_t width) {
  const __m512 one = _mm512_set1_ps(1.f);
  at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / width), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T *gate = gate_up + row * 2 * width, *up = gate + width;
      T *dgate = dgate_up + row * 2 * width, *dup = dgate + width;
      each16(0, width, [&](int64_t i, auto m) {
        fetch(gate + i), fetch(up + i), fetch(dy + row * width + i);
        const __m512 g = load(gate + i, m), d = load(dy + row * width + i, m), s = sigmoid512(g);
        const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
        store(dup + i, _mm512_mul_ps(d, _mm512_mul_ps(g, s)), m);
        store(dgate + i, _mm512_mul_ps(_mm512_mul_ps(d, load(up + i, m)), slope), m);
      });
    }
  });
}

template <class T>
void rotate(const Rotary<T>& a) {
  const int64_t grain = std::max<int64_t>(1, 8192 / (a.heads * a.d));
  at::parallel_for(0, a.tokens, grain, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      for (int64_t h = 0; h < a.heads; ++h)
        rotate_head(a.x + t * a.x_token + h * a.x_head, a.y + (t * a.heads + h) * a.d, a.cos + t * a.pairs,
                    a.sin + t * a.pairs, a.d, a.pairs, a.interleaved, a.inverse);
  });
}

template void swiglu_forward(const bf16*, bf16*, int64_t, int64_t);
template void swiglu_forward(const float*, float*, int64_t, int64_t);
template void swiglu_backward(const bf16*, const bf16*, bf16*, int64_t, int64_t);
template void swiglu_backward(const float*, const float*, float*, int64_t, int64_t);
template void rotate(const Rotary<bf16>&);
template void rotate(const Rotary<float>&);

}  // namespace grpo

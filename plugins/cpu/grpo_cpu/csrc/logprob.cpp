// The passes of loss.logprob over rows of logits; the matrix products around them are torch's.
// With z = x / T and p = softmax(z): logprob = z[label] - lse, entropy = lse - sum p z.
#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace grpo {
namespace {

constexpr int64_t CHUNK = 4096;  // summed in float32; chunks are added in float64

template <class T>
void forward_row(const LogitRows<T>& a, int64_t row) {
  const T* x = a.logits + row * a.vocab;
  __m512 high = _mm512_set1_ps(NEG_INF);
  each16(0, a.vocab, [&](int64_t i, auto m) {
    high = _mm512_mask_max_ps(high, m, high, load(x + i, m));
  });
  const float top = _mm512_reduce_max_ps(high);
  const __m512 shift = _mm512_set1_ps(top), factor = _mm512_set1_ps(a.inverse_temperature);
  double total = 0, mean = 0;
  for (int64_t c = 0; c < a.vocab; c += CHUNK) {
    __m512 sum = _mm512_setzero_ps(), weighted = sum;
    each16(c, std::min(a.vocab, c + CHUNK), [&](int64_t i, auto m) {
      const __m512 z = _mm512_mul_ps(_mm512_sub_ps(load(x + i, m), shift), factor);
      const __m512 e = _mm512_maskz_mov_ps(m, exp512(z));
      sum = _mm512_add_ps(sum, e);
      // A logit of -inf weighs nothing: 0 * -inf would be NaN.
      weighted = _mm512_mask3_fmadd_ps(e, z, weighted,
                                       _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_NEQ_UQ));
    });
    total += _mm512_reduce_add_ps(sum);
    mean += _mm512_reduce_add_ps(weighted);
  }
  const double log_total = std::log(total);
  a.lse[row] = (float)(log_total + (double)top * a.inverse_temperature);
  a.entropy[row] = (float)(log_total - mean / total);
  a.logprob[row] = (float)(((double)to_float(x[a.labels[row]]) - top) * a.inverse_temperature - log_total);
}

// Overwrites the logits with the gradient of g_logprob * logprob + g_entropy * entropy.
template <class T>
void backward_row(const LogitRows<T>& a, int64_t row, float g_logprob, float g_entropy) {
  T* x = a.logits + row * a.vocab;
  const int64_t label = a.labels[row];
  const __m512 factor = _mm512_set1_ps(a.inverse_temperature), lse = _mm512_set1_ps(a.lse[row]);
  const __m512 gl = _mm512_set1_ps(-g_logprob), ge = _mm512_set1_ps(-g_entropy);
  const __m512 entropy = _mm512_set1_ps(a.entropy[row]);
  each16(0, a.vocab, [&](int64_t i, auto m) {
    const __m512 log_p = _mm512_fmsub_ps(load(x + i, m), factor, lse), p = exp512(log_p);
    __m512 g = _mm512_fmadd_ps(ge, _mm512_add_ps(log_p, entropy), gl);
    g = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(p, _mm512_setzero_ps(), _CMP_NEQ_UQ), g, p);
    if (label >= i && label < i + 16)
      g = _mm512_mask_add_ps(g, (__mmask16)(1u << (label - i)), g, _mm512_set1_ps(g_logprob));
    store(x + i, _mm512_mul_ps(g, factor), m);
  });
}

}  // namespace

template <class T>
void logits_forward(const LogitRows<T>& a) {
  at::parallel_for(0, a.rows, 1, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) forward_row(a, row);
  });
}

template <class T>
void logits_backward(const LogitRows<T>& a, const float* g_logprob, const float* g_entropy) {
  at::parallel_for(0, a.rows, 1, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) backward_row(a, row, g_logprob[row], g_entropy[row]);
  });
}

template void logits_forward(const LogitRows<bf16>&);
template void logits_forward(const LogitRows<float>&);
template void logits_backward(const LogitRows<bf16>&, const float*, const float*);
template void logits_backward(const LogitRows<float>&, const float*, const float*);

void add_rows(float* total, const bf16* part, int64_t size) {
  at::parallel_for(0, (size + 15) / 16, 2048, [&](int64_t from, int64_t to) {
    each16(from * 16, std::min(size, to * 16), [&](int64_t i, auto m) {
      store(total + i, _mm512_add_ps(load(total + i, m), load(part + i, m)), m);
    });
  });
}

}  // namespace grpo

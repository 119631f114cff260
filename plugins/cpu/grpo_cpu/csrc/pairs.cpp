// moe.dispatch and moe.combine: the pairs of a token and an expert, sorted and summed.
#include <ATen/Parallel.h>

#include <vector>

#include "moe.h"

namespace grpo {

bool sort_pairs(const int64_t* ids, int64_t n, int64_t experts, int64_t* order, int64_t* places,
                int64_t* counts) {
  std::fill(counts, counts + experts, 0);
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= experts) return false;
    ++counts[ids[i]];
  }
  std::vector<int64_t> next(experts, 0);
  for (int64_t x = 1; x < experts; ++x) next[x] = next[x - 1] + counts[x - 1];
  for (int64_t i = 0; i < n; ++i) {
    places[i] = next[ids[i]]++;
    order[places[i]] = i;
  }
  return true;
}

template <class T>
void sum_pairs(const T* rows, const float* weights, const int64_t* places, int64_t tokens, int64_t k,
               int64_t c, T* y) {
  at::parallel_for(0, tokens, std::max<int64_t>(1, 8192 / (k * c)), [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      each16(0, c, [&](int64_t i, auto lanes) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < k; ++j) {
          const __m512 x = load(rows + places[t * k + j] * c + i, lanes);
          sum = weights ? _mm512_fmadd_ps(_mm512_set1_ps(weights[t * k + j]), x, sum) : _mm512_add_ps(x, sum);
        }
        store(y + t * c + i, sum, lanes);
      });
  });
}

template <class T>
void sum_pairs_backward(const T* rows, const float* weights, const int64_t* places, const T* dy,
                        int64_t tokens, int64_t k, int64_t c, T* drows, float* dweights) {
  at::parallel_for(0, tokens * k, std::max<int64_t>(1, 8192 / c), [&](int64_t from, int64_t to) {
    for (int64_t pair = from; pair < to; ++pair) {
      const T *g = dy + pair / k * c, *row = rows + places[pair] * c;
      const __m512 weight = _mm512_set1_ps(weights[pair]);
      __m512 dot = _mm512_setzero_ps();
      each16(0, c, [&](int64_t i, auto lanes) {
        const __m512 x = load(g + i, lanes);
        if (dweights) dot = _mm512_fmadd_ps(x, load(row + i, lanes), dot);
        if (drows) store(drows + places[pair] * c + i, _mm512_mul_ps(weight, x), lanes);
      });
      if (dweights) dweights[pair] = _mm512_reduce_add_ps(dot);
    }
  });
}

template void sum_pairs(const bf16*, const float*, const int64_t*, int64_t, int64_t, int64_t, bf16*);
template void sum_pairs(const float*, const float*, const int64_t*, int64_t, int64_t, int64_t, float*);
template void sum_pairs_backward(const bf16*, const float*, const int64_t*, const bf16*, int64_t, int64_t,
                                 int64_t, bf16*, float*);
template void sum_pairs_backward(const float*, const float*, const int64_t*, const float*, int64_t, int64_t,
                                 int64_t, float*, float*);

}  // namespace grpo

// sample.token: exact inversion of the cumulative distribution in the order of token ids.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace grpo {
namespace {

constexpr int64_t CHUNK = 512;

struct Row {
  float* weight;  // unnormalised probabilities under the sampling distribution, 0 for a filtered token
  double* chunk;  // their sums by CHUNK
  int64_t vocab, chunks;
  float top;
  double inverse_temperature;
};

template <class T>
bool find_top(const T* x, int64_t vocab, float* top) {
  __m512 high = _mm512_set1_ps(NEG_INF);
  __mmask16 nan = 0;
  for (int64_t i = 0; i < vocab; i += 16) {
    const __mmask16 m = first(vocab - i);
    const __m512 v = load(x + i, m);
    nan |= _mm512_mask_cmp_ps_mask(m, v, v, _CMP_UNORD_Q);
    high = _mm512_mask_max_ps(high, m, high, v);
  }
  *top = _mm512_reduce_max_ps(high);
  return !nan && std::isfinite(*top);
}

// Fills the weights and their sums; returns the sum of exp(x - top) at temperature 1.
template <class T>
double weigh(const T* x, const Row& row) {
  const __m512 top = _mm512_set1_ps(row.top), factor = _mm512_set1_ps((float)row.inverse_temperature);
  const bool plain = row.inverse_temperature == 1.0;
  double total1 = 0;
  for (int64_t c = 0; c < row.chunks; ++c) {
    __m512 sum = _mm512_setzero_ps(), sum1 = sum;
    for (int64_t i = c * CHUNK; i < std::min(row.vocab, (c + 1) * CHUNK); i += 16) {
      const __mmask16 m = first(row.vocab - i);
      const __m512 gap = _mm512_sub_ps(load(x + i, m), top);
      const __m512 e1 = _mm512_maskz_mov_ps(m, exp512(gap));
      const __m512 e = plain ? e1 : _mm512_maskz_mov_ps(m, exp512(_mm512_mul_ps(gap, factor)));
      store(row.weight + i, e, m);
      sum = _mm512_add_ps(sum, e);
      sum1 = _mm512_add_ps(sum1, e1);
    }
    row.chunk[c] = _mm512_reduce_add_ps(sum);
    total1 += _mm512_reduce_add_ps(sum1);
  }
  return total1;
}

// Keeps tokens above `border`, and of those at it the `ties` with the lowest ids.
template <class T>
void keep(const T* x, const Row& row, float border, int64_t ties) {
  for (int64_t i = 0; i < row.vocab; ++i) {
    const float v = to_float(x[i]);
    if (v < border || (v == border && ties-- <= 0)) row.weight[i] = 0.f;
  }
}

template <class T>
void top_k(const T* x, const Row& row, int64_t k, std::vector<float>& sorted) {
  sorted.resize(row.vocab);
  for (int64_t i = 0; i < row.vocab; ++i) sorted[i] = to_float(x[i]);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
  keep(x, row, sorted[k - 1], row.vocab);
}

// The likeliest tokens until their mass reaches p; the first stays whatever p is.
template <class T>
void top_p(const T* x, const Row& row, float p, std::vector<float>& sorted) {
  double total = 0;
  for (int64_t i = 0; i < row.vocab; ++i) total += row.weight[i];
  const double wanted = (double)p * total;
  for (const float least : {6e-6f, 0.f}) {  // most mass is in few tokens: sort only these where they do
    sorted.clear();
    double mass = 0;
    for (int64_t i = 0; i < row.vocab; ++i)
      if (row.weight[i] > least) sorted.push_back(to_float(x[i])), mass += row.weight[i];
    if (mass >= wanted || least == 0.f) break;
  }
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  double before = 0;
  size_t n = 0;
  const double scale = row.inverse_temperature;
  do before += std::exp((sorted[n] - (double)row.top) * scale);
  while (++n < sorted.size() && before < wanted);
  const float border = sorted[n - 1];
  keep(x, row, border, (int64_t)n - (std::lower_bound(sorted.begin(), sorted.end(), border, std::greater<float>()) -
                                     sorted.begin()));
}

template <class T>
void filter(const T* x, const Row& row, int64_t k, float p, float min_p, std::vector<float>& sorted) {
  if (k > 0 && k < row.vocab) top_k(x, row, k, sorted);
  if (p < 1.f) top_p(x, row, p, sorted);
  if (min_p > 0.f) {
    const double floor = std::log((double)min_p);
    for (int64_t i = 0; i < row.vocab; ++i)
      if (((double)to_float(x[i]) - row.top) * row.inverse_temperature < floor) row.weight[i] = 0.f;
  }
  for (int64_t c = 0; c < row.chunks; ++c) {
    row.chunk[c] = 0;
    for (int64_t i = c * CHUNK; i < std::min(row.vocab, (c + 1) * CHUNK); ++i) row.chunk[c] += row.weight[i];
  }
}

int64_t invert(const Row& row, double target) {
  int64_t c = 0;
  while (c < row.chunks - 1 && target >= row.chunk[c]) target -= row.chunk[c++];
  int64_t i = c * CHUNK;
  for (const int64_t end = std::min(row.vocab, i + CHUNK); i < end; ++i) {
    if (target < row.weight[i]) return i;
    target -= row.weight[i];
  }
  // Rounding of the sums carried the target past its chunk: the last token with a weight before it.
  while (i > 0 && row.weight[i - 1] == 0.f) --i;
  return i - 1;
}

template <class T>
bool draw_row(const Draw& a, int64_t r, const Row& scratch, std::vector<float>& sorted) {
  const T* x = (const T*)a.logits + r * a.vocab;
  Row row = scratch;
  if (!find_top(x, a.vocab, &row.top)) return false;
  const bool greedy = a.temperature[r] == 0.f;
  row.inverse_temperature = greedy ? 1.0 : 1.0 / (double)a.temperature[r];
  const double total1 = weigh(x, row);
  int64_t id = 0;
  if (greedy) {
    while (to_float(x[id]) != row.top) ++id;
    a.logprob[r] = 0.f;
  } else {
    const int64_t k = a.top_k ? a.top_k[r] : 0;
    const float p = a.top_p ? a.top_p[r] : 1.f, min_p = a.min_p ? a.min_p[r] : 0.f;
    if (k > 0 || p < 1.f || min_p > 0.f) filter(x, row, k, p, min_p, sorted);
    double total = 0;
    for (int64_t c = 0; c < row.chunks; ++c) total += row.chunk[c];
    id = invert(row, a.u[r] * total);
    a.logprob[r] = (float)(((double)to_float(x[id]) - row.top) * row.inverse_temperature - std::log(total));
  }
  a.ids[r] = id;
  a.logprob1[r] = (float)((double)to_float(x[id]) - row.top - std::log(total1));
  return true;
}

}  // namespace

bool draw(const Draw& a) {
  std::atomic<bool> sound{true};
  at::parallel_for(0, a.rows, 1, [&](int64_t from, int64_t to) {
    thread_local Scratch<float> weights;
    thread_local Scratch<double> sums;
    std::vector<float> sorted;
    const int64_t chunks = (a.vocab + CHUNK - 1) / CHUNK;
    const Row row{weights.get(a.vocab), sums.get(chunks), a.vocab, chunks, 0.f, 1.0};
    for (int64_t r = from; r < to; ++r)
      if (!(a.wide ? draw_row<float>(a, r, row, sorted) : draw_row<bf16>(a, r, row, sorted))) sound = false;
  });
  return sound;
}

}  // namespace grpo

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
  each16(0, vocab, [&](int64_t i, auto m) {
    const __m512 v = load(x + i, m);
    nan |= _mm512_mask_cmp_ps_mask(m, v, v, _CMP_UNORD_Q);
    high = _mm512_mask_max_ps(high, m, high, v);
  });
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
    each16(c * CHUNK, std::min(row.vocab, (c + 1) * CHUNK), [&](int64_t i, auto m) {
      const __m512 gap = _mm512_sub_ps(load(x + i, m), top);
      const __m512 e1 = _mm512_maskz_mov_ps(m, exp512(gap));
      const __m512 e = plain ? e1 : _mm512_maskz_mov_ps(m, exp512(_mm512_mul_ps(gap, factor)));
      store(row.weight + i, e, m);
      sum = _mm512_add_ps(sum, e);
      sum1 = _mm512_add_ps(sum1, e1);
    });
    row.chunk[c] = _mm512_reduce_add_ps(sum);
    total1 += _mm512_reduce_add_ps(sum1);
  }
  return total1;
}

// Keeps tokens above `border`, and of those at it the `ties` with the lowest ids.
template <class T>
void keep(const T* x, const Row& row, float border, int64_t ties) {
  const __m512 line = _mm512_set1_ps(border);
  each16(0, row.vocab, [&](int64_t i, auto m) {
    const __m512 v = load(x + i, m);
    __mmask16 out = _mm512_mask_cmp_ps_mask(m, v, line, _CMP_LT_OQ);
    for (uint32_t equal = _mm512_mask_cmp_ps_mask(m, v, line, _CMP_EQ_OQ); equal; equal &= equal - 1)
      if (ties-- <= 0) out |= (__mmask16)(equal & -equal);
    if (out) _mm512_mask_storeu_ps(row.weight + i, out, _mm512_setzero_ps());
  });
}

// The logits above `line` that still have a weight, in `found`; returns their weights' sum.
template <class T>
double gather(const T* x, const Row& row, float line, std::vector<float>& found) {
  found.resize(row.vocab + 16);
  float* out = found.data();
  double mass = 0;
  for (int64_t c = 0; c < row.chunks; ++c) {
    __m512 sum = _mm512_setzero_ps();
    each16(c * CHUNK, std::min(row.vocab, (c + 1) * CHUNK), [&](int64_t i, auto m) {
      const __m512 v = load(x + i, m), e = load(row.weight + i, m);
      const __mmask16 in = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_GT_OQ), v,
                                                   _mm512_set1_ps(line), _CMP_GT_OQ);
      _mm512_storeu_ps(out, _mm512_maskz_compress_ps(in, v));
      out += __builtin_popcount(in);
      sum = _mm512_mask_add_ps(sum, in, sum, e);
    });
    mass += _mm512_reduce_add_ps(sum);
  }
  found.resize(out - found.data());
  return mass;
}

// Most mass and the likeliest tokens lie near the top: looking at all tokens is the last resort. Gaps in
// units of the tempered logits.
constexpr double GAPS[] = {3.0, 6.0, 9.0, 12.0, std::numeric_limits<double>::infinity()};

float line_at(const Row& row, double gap) { return (float)(row.top - gap / row.inverse_temperature); }

template <class T>
void top_k(const T* x, const Row& row, int64_t k, std::vector<float>& found) {
  for (const double gap : GAPS) {
    gather(x, row, line_at(row, gap), found);
    if ((int64_t)found.size() >= k) break;
  }
  if ((int64_t)found.size() < k) return;  // the others have no weight
  std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<float>());
  keep(x, row, found[k - 1], row.vocab);
}

// The likeliest tokens until their mass reaches p; the first stays whatever p is.
template <class T>
void top_p(const T* x, const Row& row, float p, std::vector<float>& found) {
  const double wanted = (double)p * gather(x, row, NEG_INF, found);
  for (const double gap : GAPS)
    if (gather(x, row, line_at(row, gap), found) >= wanted) break;
  std::sort(found.begin(), found.end(), std::greater<float>());
  double before = 0;
  size_t n = 0;
  do before += std::exp((found[n] - (double)row.top) * row.inverse_temperature);
  while (++n < found.size() && before < wanted);
  const float border = found[n - 1];
  const auto equal = std::lower_bound(found.begin(), found.end(), border, std::greater<float>());
  keep(x, row, border, (int64_t)n - (equal - found.begin()));
}

// Tokens at least min_p times as likely as the first.
template <class T>
void above_min_p(const T* x, const Row& row, float min_p) {
  const double line = row.top + std::log((double)min_p) / row.inverse_temperature;
  float border = (float)line;
  if ((double)border < line) border = std::nextafter(border, std::numeric_limits<float>::infinity());
  keep(x, row, border, row.vocab);
}

template <class T>
void filter(const T* x, const Row& row, int64_t k, float p, float min_p, std::vector<float>& found) {
  if (k > 0 && k < row.vocab) top_k(x, row, k, found);
  if (p < 1.f) top_p(x, row, p, found);
  if (min_p > 0.f) above_min_p(x, row, min_p);
  for (int64_t c = 0; c < row.chunks; ++c) {
    __m512 sum = _mm512_setzero_ps();
    each16(c * CHUNK, std::min(row.vocab, (c + 1) * CHUNK),
           [&](int64_t i, auto m) { sum = _mm512_add_ps(sum, load(row.weight + i, m)); });
    row.chunk[c] = _mm512_reduce_add_ps(sum);
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
bool draw_row(const Draw& a, int64_t r, const Row& scratch, std::vector<float>& found) {
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
    if (k > 0 || p < 1.f || min_p > 0.f) filter(x, row, k, p, min_p, found);
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
    std::vector<float> found;
    const int64_t chunks = (a.vocab + CHUNK - 1) / CHUNK;
    const Row row{weights.get(a.vocab), sums.get(chunks), a.vocab, chunks, 0.f, 1.0};
    for (int64_t r = from; r < to; ++r)
      if (!(a.wide ? draw_row<float>(a, r, row, found) : draw_row<bf16>(a, r, row, found))) sound = false;
  });
  return sound;
}

}  // namespace grpo

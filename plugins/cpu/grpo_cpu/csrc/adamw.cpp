// optim.adamw: one pass over parameter, gradient and moments, writing the bf16 copy on the way.
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace grpo {
namespace {

constexpr int64_t PIECE = 1 << 15;

void update(const AdamWPart& part, const AdamWStep& s, int64_t from, int64_t to) {
  const __m512 scale = _mm512_set1_ps(s.grad_scale), decay = _mm512_set1_ps(part.decay);
  const __m512 pull1 = _mm512_set1_ps(s.pull1), pull2 = _mm512_set1_ps(s.pull2);
  const __m512 beta2 = _mm512_set1_ps(s.beta2);
  const __m512 rate = _mm512_set1_ps(s.rate), unbias = _mm512_set1_ps(s.unbias), eps = _mm512_set1_ps(s.eps);
  each16(from, to, [&](int64_t i, auto k) {
    const __m512 g = _mm512_mul_ps(load(part.grad + i, k), scale);
    __m512 m = load(part.first + i, k), v = load(part.second + i, k);
    m = _mm512_fmadd_ps(_mm512_sub_ps(g, m), pull1, m);
    v = _mm512_fmadd_ps(_mm512_mul_ps(g, g), pull2, _mm512_mul_ps(v, beta2));
    const __m512 root = _mm512_fmadd_ps(_mm512_sqrt_ps(v), unbias, eps);
    __m512 p = _mm512_mul_ps(load(part.param + i, k), decay);
    p = _mm512_fnmadd_ps(rate, _mm512_div_ps(m, root), p);
    store(part.first + i, m, k);
    store(part.second + i, v, k);
    store(part.param + i, p, k);
    if (part.copy) store(part.copy + i, p, k);
  });
}

}  // namespace

void adamw(const AdamWPart* parts, int64_t count, const AdamWStep& step) {
  std::vector<int64_t> pieces(count + 1, 0);
  for (int64_t i = 0; i < count; ++i) pieces[i + 1] = pieces[i] + (parts[i].size + PIECE - 1) / PIECE;
  at::parallel_for(0, pieces[count], 1, [&](int64_t from, int64_t to) {
    int64_t part = std::upper_bound(pieces.begin(), pieces.end(), from) - pieces.begin() - 1;
    for (int64_t piece = from; piece < to; ++piece) {
      while (piece >= pieces[part + 1]) ++part;
      const int64_t start = (piece - pieces[part]) * PIECE;
      update(parts[part], step, start, std::min(parts[part].size, start + PIECE));
    }
  });
}

}  // namespace grpo

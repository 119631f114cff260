// moe.experts forward for experts with many rows: rows are A as they lie, a panel of an expert's weights is
// packed once for all of them, and SwiGLU is taken while its inputs are in registers.
#include "grouped.h"
#include "moe.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t HALF = LANES / 2;  // columns of gate beside as many of up

template <class T>
static inline __m512 gated(__m512 gate, __m512 up) {
  return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid512(gate)), up);
}

unit* panel_of(int64_t units) {
  static thread_local Scratch<unit> kept;
  return kept.get(units + 16);
}

// Columns f0..f0+n of gate, up and hidden.
template <class T>
void hidden_panel(const Experts<T>& a, const Share& s, int64_t f0, int64_t n, T* gate_up_out, T* hidden) {
  const int64_t kp = a.c / PER_UNIT<T>, half = n > 16 ? HALF : 16;
  unit* panel = panel_of(kp * 2 * half);
  const T* weight = a.gate_up + (s.expert * 2 * a.f + f0) * a.c;
  pack_columns(units(weight), kp, n, kp, panel, half, 2 * half);
  pack_columns(units(weight + a.f * a.c), kp, n, kp, panel + half, half, 2 * half);
  const auto finish = [&](int64_t i, const auto& sums) {
    constexpr int NV = sizeof(sums) / sizeof(sums[0]) / 2;
    T* out = gate_up_out ? gate_up_out + (s.start + i) * 2 * a.f + f0 : nullptr;
    T* h = hidden + (s.start + i) * a.f + f0;
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      // Rounded first, so that what the backward pass reads is what was used.
      const __m512 gate = rounded<T>(sums[j]), up = rounded<T>(sums[NV + j]);
      const auto put = [&](auto lanes) {
        if (out) store(out + 16 * j, gate, lanes), store(out + a.f + 16 * j, up, lanes);
        store(h + 16 * j, gated<T>(gate, up), lanes);
      };
      if (n >= 16 * (j + 1))
        put(All{});
      else
        put(first(n - 16 * j));
    }
  };
  const unit* rows = units(a.rows + s.start * a.c);
  if (half > 16)
    group_rows<T, 6, 4>(s.rows, kp, rows, kp, 1, panel, 2 * half, 0, finish);
  else
    group_rows<T, 12, 2>(s.rows, kp, rows, kp, 1, panel, 2 * half, 0, finish);
}

// Columns c0..c0+n of the result.
template <class T>
void down_panel(const Experts<T>& a, const Share& s, int64_t c0, int64_t n, const T* hidden, T* y) {
  const int64_t kp = a.f / PER_UNIT<T>, padded = (n + 15) / 16 * 16;
  unit* panel = panel_of(kp * padded);
  pack_columns(units(a.down + (s.expert * a.c + c0) * a.f), kp, n, kp, panel, padded, padded);
  group_gemm<T, T>(s.rows, n, kp, units(hidden + s.start * a.f), kp, 1, panel, padded,
                   y + s.start * a.c + c0, a.c);
}

}  // namespace

template <class T>
void experts_many(const Experts<T>& a, const std::vector<Share>& shares, T* gate_up_out, T* hidden, T* y) {
  const int64_t f_panels = (a.f + HALF - 1) / HALF, c_panels = (a.c + LANES - 1) / LANES;
  spread((int64_t)shares.size() * f_panels, [&](int64_t task) {
    const int64_t f0 = task % f_panels * HALF;
    hidden_panel(a, shares[task / f_panels], f0, std::min(HALF, a.f - f0), gate_up_out, hidden);
  });
  spread((int64_t)shares.size() * c_panels, [&](int64_t task) {
    const int64_t c0 = task % c_panels * LANES;
    down_panel(a, shares[task / c_panels], c0, std::min(LANES, a.c - c0), hidden, y);
  });
}

template void experts_many(const Experts<bf16>&, const std::vector<Share>&, bf16*, bf16*, bf16*);
template void experts_many(const Experts<float>&, const std::vector<Share>&, float*, float*, float*);

}  // namespace grpo

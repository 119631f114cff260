// moe.experts backward. A task is an expert and 64 columns of a result; panels of B are packed in cache.
#include <vector>

#include "grouped.h"
#include "moe.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t ROWS = 48;   // rows at a time, where a result goes through a float32 buffer
constexpr int64_t DEEP = 512;  // rows that the gradient of a weight sums at a time

struct Task {
  int64_t expert, start, rows, column, width;
  int64_t padded() const { return (width + 15) / 16 * 16; }
};

// Experts with rows (or all experts), 64 columns each.
std::vector<Task> tasks_of(const int64_t* counts, int64_t experts, int64_t columns, bool all) {
  std::vector<Task> tasks;
  int64_t start = 0;
  for (int64_t x = 0; x < experts; start += counts[x++])
    for (int64_t c = 0; c < columns && (all || counts[x]); c += LANES)
      tasks.push_back({x, start, counts[x], c, std::min(LANES, columns - c)});
  return tasks;
}

template <class T>
unit* scratch(int64_t k, int64_t padded) {
  static thread_local Scratch<unit> kept;
  return kept.get((k + 1) / PER_UNIT<T> * padded + 16);
}

// SwiGLU and its gradient over `m` rows from `row` and a task's columns; dh [m][64].
template <class T>
void through_swiglu(const Experts<T>& a, const T* gate_up_out, const Task& t, int64_t row, int64_t m,
                    const float* dh, T* dgate_up, T* h) {
  const __m512 one = _mm512_set1_ps(1.f);
  for (int64_t r = 0; r < m; ++r) {
    const int64_t at = (row + r) * 2 * a.f + t.column;
    T* hidden = h + (row + r) * a.f + t.column;
    each16(0, t.width, [&](int64_t i, auto lanes) {
      const __m512 x = load(gate_up_out + at + i, lanes), u = load(gate_up_out + at + a.f + i, lanes);
      const __m512 s = sigmoid512(x), silu = _mm512_mul_ps(x, s), d = load(dh + r * LANES + i);
      const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
      store(hidden + i, _mm512_mul_ps(silu, u), lanes);
      store(dgate_up + at + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), lanes);
      store(dgate_up + at + a.f + i, _mm512_mul_ps(d, silu), lanes);
    });
  }
}

// dh = dy down, then through SwiGLU.
template <class T>
void hidden_gradient(const Experts<T>& a, const ExpertsGrad<T>& g, const Task& t, T* dgate_up, T* h) {
  alignas(64) float dh[ROWS * LANES];
  const int64_t kp = a.c / PER_UNIT<T>, padded = t.padded();
  unit* panel = scratch<T>(a.c, padded);
  pack_rows(a.down + t.expert * a.c * a.f + t.column, a.f, a.c, t.width, panel, padded);
  for (int64_t i = 0; i < t.rows; i += ROWS) {
    const int64_t row = t.start + i, m = std::min(ROWS, t.rows - i);
    group_gemm<T, float>(m, padded, kp, units(g.dy + row * a.c), kp, 1, panel, padded, dh, LANES);
    through_swiglu(a, g.gate_up_out, t, row, m, dh, dgate_up, h);
  }
}

// drows = dgate_up gate_up.
template <class T>
void row_gradient(const Experts<T>& a, const Task& t, const T* dgate_up, T* drows) {
  const int64_t kp = 2 * a.f / PER_UNIT<T>, padded = t.padded();
  unit* panel = scratch<T>(2 * a.f, padded);
  pack_rows(a.gate_up + t.expert * 2 * a.f * a.c + t.column, a.c, 2 * a.f, t.width, panel, padded);
  group_gemm<T, T>(t.rows, t.width, kp, units(dgate_up + t.start * 2 * a.f), kp, 1, panel, padded,
                   drows + t.start * a.c + t.column, a.c);
}

// Columns of dw [n, k] of one expert: the sum over its rows of g [rows, n] times x [rows, k].
template <class T>
void weight_gradient(const Task& t, const T* g, int64_t n, const T* x, int64_t k, T* dw_all) {
  T* dw = dw_all + t.expert * n * k + t.column;
  if (t.rows == 0)
    for (int64_t i = 0; i < n; ++i) std::memset(dw + i * k, 0, t.width * sizeof(T));
  static thread_local Scratch<unit> g_kept;
  static thread_local Scratch<float> sum_kept;
  const int64_t padded = t.padded(), g_padded = (n + 15) / 16 * 16;
  float* sums = t.rows > DEEP ? sum_kept.get(n * LANES) : nullptr;
  for (int64_t i = 0; i < t.rows; i += DEEP) {
    const int64_t row = t.start + i, m = std::min(DEEP, t.rows - i), kp = (m + PER_UNIT<T> - 1) / PER_UNIT<T>;
    unit *b = scratch<T>(m, padded), *a = g_kept.get(kp * g_padded);
    pack_rows(x + row * k + t.column, k, m, t.width, b, padded);
    pack_rows(g + row * n, n, m, n, a, g_padded);
    if (sums)
      group_gemm<T, float>(n, padded, kp, a, 1, g_padded, b, padded, sums, LANES, i > 0);
    else
      group_gemm<T, T>(n, t.width, kp, a, 1, g_padded, b, padded, dw, k);
  }
  for (int64_t i = 0; sums && i < n; ++i)
    each16(0, t.width, [&](int64_t j, auto lanes) {
      store(dw + i * k + j, load(sums + i * LANES + j), lanes);
    });
}

}  // namespace

template <class T>
void experts_backward(const Experts<T>& a, const ExpertsGrad<T>& g, T* dgate_up, T* h) {
  const auto run = [&](int64_t columns, bool all, auto&& work) {
    const std::vector<Task> tasks = tasks_of(a.counts, a.experts, columns, all);
    spread((int64_t)tasks.size(), [&](int64_t i) { work(tasks[i]); });
  };
  run(a.f, false, [&](const Task& t) { hidden_gradient(a, g, t, dgate_up, h); });
  if (g.drows) run(a.c, false, [&](const Task& t) { row_gradient(a, t, dgate_up, g.drows); });
  if (g.dgate_up)
    run(a.c, true, [&](const Task& t) { weight_gradient(t, dgate_up, 2 * a.f, a.rows, a.c, g.dgate_up); });
  if (g.ddown) run(a.f, true, [&](const Task& t) { weight_gradient(t, g.dy, a.c, h, a.f, g.ddown); });
}

template void experts_backward(const Experts<bf16>&, const ExpertsGrad<bf16>&, bf16*, bf16*);
template void experts_backward(const Experts<float>&, const ExpertsGrad<float>&, float*, float*);

}  // namespace grpo

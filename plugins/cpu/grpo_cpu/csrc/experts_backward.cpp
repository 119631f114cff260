// moe.experts backward. A task is an expert and some columns of a result; panels of B are packed in cache.
#include <vector>

#include "grouped.h"
#include "moe.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t DEEP = 512;  // rows that the gradient of a weight sums at a time
constexpr int64_t TALL = 48;   // rows of a weight's gradient whose factors are packed together
constexpr int64_t PANELS = 4;  // panels of the other factor beside them, at most

struct Task {
  int64_t expert, start, rows, column, width;
  int64_t padded() const { return (width + 15) / 16 * 16; }
};

// Experts with rows (or all experts), `wide` columns each.
std::vector<Task> tasks_of(const int64_t* counts, int64_t experts, int64_t columns, int64_t wide, bool all) {
  std::vector<Task> tasks;
  int64_t start = 0;
  for (int64_t x = 0; x < experts; start += counts[x++])
    for (int64_t c = 0; c < columns && (all || counts[x]); c += wide)
      tasks.push_back({x, start, counts[x], c, std::min(wide, columns - c)});
  return tasks;
}

template <class T>
unit* scratch(int64_t k, int64_t padded) {
  static thread_local Scratch<unit> kept;
  return kept.get((k + 1) / PER_UNIT<T> * padded + 16);
}

// dh = dy down, then through SwiGLU while it is in registers.
template <class T>
void hidden_gradient(const Experts<T>& a, const ExpertsGrad<T>& g, const Task& t, T* dgate_up, T* h) {
  const int64_t kp = a.c / PER_UNIT<T>, padded = t.padded();
  unit* panel = scratch<T>(a.c, padded);
  pack_rows(a.down + t.expert * a.c * a.f + t.column, a.f, a.c, t.width, panel, padded);
  const __m512 one = _mm512_set1_ps(1.f);
  const auto finish = [&](int64_t i, const auto& dh) {
    constexpr int NV = sizeof(dh) / sizeof(dh[0]);
    const int64_t at = (t.start + i) * 2 * a.f + t.column;
    const T *gate = g.gate_up_out + at, *up = gate + a.f;
    T *dgate = dgate_up + at, *dup = dgate + a.f, *hidden = h + (t.start + i) * a.f + t.column;
    // Short runs of long rows, which the CPU does not foresee: those of the tile after the next.
    for (int64_t j = 0; j < t.width; j += 64 / (int64_t)sizeof(T)) {
      _mm_prefetch((const char*)(gate + 24 * a.f + j), _MM_HINT_T0);
      _mm_prefetch((const char*)(up + 24 * a.f + j), _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const auto put = [&](auto lanes) {
        const __m512 x = load(gate + 16 * j, lanes), u = load(up + 16 * j, lanes);
        const __m512 s = sigmoid512(x), silu = _mm512_mul_ps(x, s);
        const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(one, s), one));
        store(hidden + 16 * j, _mm512_mul_ps(silu, u), lanes);
        store(dgate + 16 * j, _mm512_mul_ps(_mm512_mul_ps(dh[j], u), slope), lanes);
        store(dup + 16 * j, _mm512_mul_ps(dh[j], silu), lanes);
      };
      if (t.width >= 16 * (j + 1))
        put(All{});
      else
        put(first(t.width - 16 * j));
    }
  };
  group_finish<T>(t.rows, t.width, kp, units(g.dy + t.start * a.c), kp, 1, panel, padded, finish);
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

// What becomes of a gradient's sums over some rows: they are the result, or a part of it.
template <class O>
struct Target {
  O* dw;              // the result, row length `pitch`
  ptrdiff_t pitch;
  float* sums;        // of earlier pieces, row length `width`, where there are several and O is not float
  int64_t width;
  bool first, last;   // piece; `first` only where dw holds nothing
  inline __attribute__((always_inline)) void put(int64_t row, int64_t column, __m512 x, __mmask16 lanes) const {
    O* to = dw + row * pitch + column;
    if constexpr (sizeof(O) == 4) {
      store(to, first ? x : _mm512_add_ps(x, load(to, lanes)), lanes);
    } else {
      float* sum = sums + row * width + column;
      if (!first) x = _mm512_add_ps(x, load(sum, lanes));
      last ? store(to, x, lanes) : store(sum, x, lanes);
    }
  }
};

// Columns of dw [n, k] of one expert: the sum over its rows, or their part from..from+m, of g [rows, n] times
// x [rows, k].
template <class T, class O>
void weight_gradient_piece(const Task& t, int64_t from, int64_t m, const T* g, int64_t n, const T* x,
                           int64_t k, const Target<O>& target) {
  static thread_local Scratch<unit> x_kept, g_kept;
  const int64_t kp = (m + PER_UNIT<T> - 1) / PER_UNIT<T>, row = t.start + from;
  unit *b = x_kept.get(kp * t.padded() + 16), *a = g_kept.get(kp * TALL + 16);
  const auto panel = [&](int64_t c) { return std::min(LANES, t.padded() - c); };
  for (int64_t c = 0; c < t.width; c += LANES)
    pack_rows(x + row * k + t.column + c, k, m, std::min(LANES, t.width - c), b + kp * c, panel(c));
  for (int64_t i = 0; i < n; i += TALL) {
    const int64_t tall = std::min(TALL, n - i), a_step = (tall + 15) / 16 * 16;
    pack_rows(g + row * n + i, n, m, tall, a, a_step);
    for (int64_t c = 0; c < t.width; c += LANES) {
      const int64_t width = std::min(LANES, t.width - c);
      group_finish<T>(tall, width, kp, a, 1, a_step, b + kp * c, panel(c), [&](int64_t r, const auto& sums) {
        constexpr int NV = sizeof(sums) / sizeof(sums[0]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) target.put(i + r, c + 16 * j, sums[j], first(width - 16 * j));
      });
    }
  }
}

// The sum is taken in pieces of about the same length. `add` keeps what dw holds.
template <class T, class O>
void weight_gradient(const Task& t, const T* g, int64_t n, const T* x, int64_t k, O* dw_all, bool add) {
  static thread_local Scratch<float> sums;
  O* dw = dw_all + t.expert * n * k + t.column;
  if (t.rows == 0 && !add)
    for (int64_t i = 0; i < n; ++i) std::memset(dw + i * k, 0, t.width * sizeof(O));
  const int64_t pieces = (t.rows + DEEP - 1) / DEEP;
  Target<O> target{dw, k, nullptr, t.width, !add, false};
  if (pieces > 1 && sizeof(O) < 4) target.sums = sums.get(n * t.width);
  for (int64_t piece = 0, from = 0; piece < pieces; ++piece) {
    const int64_t to = std::min(t.rows, (t.rows * (piece + 1) / pieces + 1) / 2 * 2);
    target.last = piece == pieces - 1;
    weight_gradient_piece(t, from, to - from, g, n, x, k, target);
    target.first = false, from = to;
  }
}

}  // namespace

template <class T>
void experts_backward(const Experts<T>& a, const ExpertsGrad<T>& g, T* dgate_up, T* h) {
  const auto run = [&](int64_t columns, int64_t wide, bool all, auto&& work) {
    const std::vector<Task> tasks = tasks_of(a.counts, a.experts, columns, wide, all);
    spread((int64_t)tasks.size(), [&](int64_t i) { work(tasks[i]); });
  };
  // Several panels save packing the other factor again, but leave fewer tasks.
  const bool enough = a.experts >= 4 * at::get_num_threads();
  const int64_t wide = enough ? PANELS * LANES : LANES;
  run(a.f, LANES, false, [&](const Task& t) { hidden_gradient(a, g, t, dgate_up, h); });
  if (g.drows) run(a.c, LANES, false, [&](const Task& t) { row_gradient(a, t, dgate_up, g.drows); });
  const auto weights = [&](const T* dy, int64_t n, const T* x, int64_t k, T* dw, float* wide_dw) {
    if (wide_dw)
      run(k, wide, false, [&](const Task& t) { weight_gradient(t, dy, n, x, k, wide_dw, true); });
    else if (dw)
      run(k, wide, true, [&](const Task& t) { weight_gradient(t, dy, n, x, k, dw, false); });
  };
  weights(dgate_up, 2 * a.f, a.rows, a.c, g.dgate_up, g.main_gate_up);
  weights(g.dy, a.c, h, a.f, g.ddown, g.main_down);
}

template void experts_backward(const Experts<bf16>&, const ExpertsGrad<bf16>&, bf16*, bf16*);
template void experts_backward(const Experts<float>&, const ExpertsGrad<float>&, float*, float*);

}  // namespace grpo

// float32 products in tiles of 8 rows and 48 columns. B is packed into panels by the task that needs them; the
// sum over a dimension is taken in one order, whatever the threads.
#include "wide_product.h"

#include <algorithm>

#include "gemm.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t TILE = 8, WIDE = 48;
constexpr int64_t BLOCK = 32;   // rows of a weight's gradient that a task takes
constexpr int64_t DEEP = 2048;  // of the summed dimension at a time: a panel that stays in the second-level cache

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
int64_t width_of(int64_t columns) { return std::min(WIDE, round_up(columns, 16)); }

// Columns [0, n) of rows of x, [rows][padded]; zeros behind them.
void pack_rows(const float* x, ptrdiff_t stride, int64_t rows, int64_t n, int64_t padded, float* out) {
  for (int64_t t = 0; t < rows; ++t, x += stride, out += padded)
    for (int64_t j = 0; j < padded; j += 16) _mm512_storeu_ps(out + j, load(x + j, first(n - j)));
}

// Row j of x [n, k] becomes column j of [k][padded].
void pack_columns(const float* x, ptrdiff_t stride, int64_t k, int64_t n, int64_t padded, float* out) {
  for (int64_t j = 0; j < padded; j += 16)
    for (int64_t t = 0; t < k; t += 16) {
      const __mmask16 m = first(k - t);
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = j + i < n ? _mm512_maskz_loadu_epi32(m, x + (j + i) * stride + t) : _mm512_setzero_si512();
      transpose16(r);
      for (int64_t i = 0; i < std::min<int64_t>(16, k - t); ++i)
        _mm512_storeu_si512(out + (t + i) * padded + j, r[i]);
    }
}

// A tile of C, `columns` of which exist; it starts from the bias, or from itself where `add`.
template <int MR, int NV>
void run_tile(const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* panel, int64_t k,
              const float* bias, bool add, float* c, ptrdiff_t c_row, int64_t columns) {
  __m512 acc[MR][NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const __m512 start = bias ? load(bias + 16 * j, first(columns - 16 * j)) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[i][j] = start;
  }
  accumulate<MR, NV>(acc, a, a_row, a_step, panel, 16 * NV, k);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* at = c + i * c_row + 16 * j;
      const __mmask16 m = first(columns - 16 * j);
      store(at, add ? _mm512_add_ps(acc[i][j], load(at, m)) : acc[i][j], m);
    }
}

template <int MR, int NV>
void run_rows(int64_t m, const float* a, ptrdiff_t a_row, ptrdiff_t a_step, const float* panel, int64_t k,
              const float* bias, bool add, float* c, ptrdiff_t c_row, int64_t columns) {
  for (; m >= MR; m -= MR, a += MR * a_row, c += MR * c_row)
    run_tile<MR, NV>(a, a_row, a_step, panel, k, bias, add, c, c_row, columns);
  if constexpr (MR > 1)
    if (m > 0) run_rows<MR / 2, NV>(m, a, a_row, a_step, panel, k, bias, add, c, c_row, columns);
}

auto rows_for(int64_t columns) {
  return columns > 32 ? run_rows<TILE, 3> : columns > 16 ? run_rows<TILE, 2> : run_rows<TILE, 1>;
}

}  // namespace

int64_t wide_packed_size(int64_t n, int64_t k) {
  return n / WIDE * WIDE * k + (n % WIDE ? width_of(n % WIDE) * k : 0);
}

void wide_pack(const float* b, ptrdiff_t stride, int64_t n, int64_t k, float* out) {
  spread((n + WIDE - 1) / WIDE, [&](int64_t i) {
    const int64_t column = i * WIDE, columns = std::min(WIDE, n - column);
    pack_columns(b + column * stride, stride, k, columns, width_of(columns), out + column * k);
  });
}

void wide_product(const WideProduct& p) {
  if (p.m == 0 || p.n == 0) return;
  const int64_t panels = (p.n + WIDE - 1) / WIDE, threads = at::get_num_threads();
  // Few columns: the rows are shared out too, at the cost of packing a panel more than once.
  const int64_t parts = std::clamp<int64_t>(2 * threads / panels, 1, (p.m + 63) / 64);
  spread(panels * parts, [&](int64_t task) {
    static thread_local Scratch<float> scratch;
    const int64_t column = task / parts * WIDE, part = task % parts, n = std::min(WIDE, p.n - column);
    const int64_t width = width_of(n), size = round_up((p.m + parts - 1) / parts, TILE);
    const int64_t from = std::min(p.m, part * size), to = std::min(p.m, from + size);
    // At least once, so that a sum of nothing is written, too.
    for (int64_t k = 0; k == 0 || k < p.k; k += DEEP) {
      const int64_t deep = std::min(DEEP, p.k - k);
      const float* panel = p.packed ? p.packed + column * p.k + k * width : nullptr;
      if (!p.packed) {
        float* mine = scratch.get(width * deep + 16);
        if (p.transposed)
          pack_columns(p.b + column * p.b_row + k, p.b_row, deep, n, width, mine);
        else
          pack_rows(p.b + k * p.b_row + column, p.b_row, deep, n, width, mine);
        panel = mine;
      }
      const float* bias = p.bias && k == 0 ? p.bias + column : nullptr;
      rows_for(n)(to - from, p.a + from * p.a_row + k, p.a_row, 1, panel, deep, bias, k > 0,
                  p.c + from * p.n + column, p.n, n);
    }
  });
}

namespace {

void add_weight_grad(const WideWeightGrad& a) {
  static thread_local Scratch<float> held;
  const int64_t width = round_up(a.k, 16), panels = (width + WIDE - 1) / WIDE;
  float* x = held.get(a.tokens * width);
  spread(panels, [&](int64_t p) {
    const int64_t k = p * WIDE;
    pack_rows(a.x + k, a.x_row, a.tokens, a.k - k, std::min(WIDE, width - k), x + a.tokens * k);
  });
  const int64_t blocks = (a.n + BLOCK - 1) / BLOCK, threads = at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(2 * threads / blocks, 1, panels);
  spread(blocks * parts, [&](int64_t task) {
    static thread_local Scratch<float> mine;
    const int64_t n = task / parts * BLOCK, part = task % parts, rows = std::min(BLOCK, a.n - n);
    float* g = mine.get(a.tokens * BLOCK);
    pack_rows(a.g + n, a.g_row, a.tokens, rows, BLOCK, g);
    for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
      const int64_t k = p * WIDE, columns = std::min(WIDE, a.k - k);
      rows_for(columns)(rows, g, 1, BLOCK, x + a.tokens * k, a.tokens, nullptr, true, a.c + n * a.k + k, a.k,
                        columns);
    }
  });
}

}  // namespace

void wide_weight_grad(const WideWeightGrad& a) {
  if (!a.n || !a.k) return;
  for (int64_t t = 0; t < a.tokens; t += DEEP)
    add_weight_grad({a.g + t * a.g_row, a.x + t * a.x_row, a.g_row, a.x_row, a.c,
                     std::min(DEEP, a.tokens - t), a.n, a.k});
}

}  // namespace grpo

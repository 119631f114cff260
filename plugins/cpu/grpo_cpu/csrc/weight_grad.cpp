// linear.dense: the gradients of a weight, C [N, K] = G [T, N]^T X [T, K] as bf16 or added to float32, and of a
// bias, the sum of G's rows.
#include <algorithm>

#include "gemm.h"
#include "kernels.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t TILE = 8;     // rows of C in registers,
constexpr int64_t WIDE = 48;    // times columns
constexpr int64_t ROWS = 16;    // rows of C that share a packed panel of G: one cache line for each pair
constexpr int64_t BLOCK = 32;   // rows of C of one task: whole cache lines of G

// Columns [0, n) of x over `count` rows as pairs [count / 2][padded][2], zeros where there is nothing.
void pack(const bf16* x, ptrdiff_t stride, int64_t count, int64_t n, int64_t padded, bf16* out) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t t = 0; t < count; t += 2, out += 2 * padded) {
    const bf16 *low = x + t * stride, *high = low + stride;
    for (int64_t j = 0; j < padded; j += 16) {
      const __mmask16 m = first(n - j);
      const __m256i a = m == 0xFFFF ? _mm256_loadu_si256((const __m256i*)(low + j))
                                    : _mm256_maskz_loadu_epi16(m, low + j);
      const __m256i b = t + 1 >= count ? zero
          : m == 0xFFFF                ? _mm256_loadu_si256((const __m256i*)(high + j))
                                       : _mm256_maskz_loadu_epi16(m, high + j);
      _mm512_storeu_si512(out + 2 * j, interleave(a, b));
    }
  }
}

// What a tile leaves in C: its own values, or the sum with what is there.
inline void leave(bf16* at, __m512 value, __mmask16 m) { store(at, value, m); }
inline void leave(float* at, __m512 value, __mmask16 m) { store(at, _mm512_add_ps(value, load(at, m)), m); }

// A tile of C, of which `rows` rows and `columns` columns exist.
template <int NV, class C>
void run_tile(const bf16* g, const bf16* x, int64_t pairs, C* c, ptrdiff_t stride, int64_t rows,
              int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < NV; ++j) _mm_prefetch((const char*)(c + i * stride + 16 * j), _MM_HINT_T0);
  __m512 acc[TILE][NV];
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_setzero_ps();
  accumulate<TILE, NV>(acc, g, 2, 2 * ROWS, x, 32 * NV, pairs);
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) leave(c + i * stride + 16 * j, acc[i][j], first(columns - 16 * j));
  }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class C>
void run_panel(const bf16* g, const bf16* x, int64_t pairs, C* c, ptrdiff_t stride, int64_t rows,
               int64_t columns) {
  const auto run = columns > 32 ? run_tile<3, C> : columns > 16 ? run_tile<2, C> : run_tile<1, C>;
  for (int64_t i = 0; i < std::min(rows, ROWS); i += TILE)
    run(g + 2 * i, x, pairs, c + i * stride, stride, std::min(rows - i, TILE), columns);
}

}  // namespace

template <class C>
void weight_grad(const WeightGrad<C>& a) {
  if (!a.n || !a.k) return;
  if (many_tokens(a.tokens, a.n, a.k)) return weight_grad_of_many(a);
  const int64_t pairs = (a.tokens + 1) / 2, width = round_up(a.k, 16);
  static thread_local Scratch<bf16> held;
  bf16* x = held.get((size_t)(2 * pairs * width));  // panels of WIDE columns, the last one narrower
  const int64_t panels = (width + WIDE - 1) / WIDE, blocks = (a.n + BLOCK - 1) / BLOCK;
  spread(panels, [&](int64_t p) {
    const int64_t k = p * WIDE;
    pack(a.x + k, a.x_row, a.tokens, a.k - k, std::min(WIDE, width - k), x + 2 * pairs * k);
  });
  // Few rows: the columns are shared out too, at the cost of packing G again.
  const int64_t threads = at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(2 * threads / std::max<int64_t>(blocks, 1), 1, panels);
  spread(blocks * parts, [&](int64_t task) {
    static thread_local Scratch<bf16> mine;
    const int64_t n = task / parts * BLOCK, part = task % parts, rows = std::min(BLOCK, a.n - n);
    bf16* g = mine.get((size_t)(2 * pairs * BLOCK));
    for (int64_t i = 0; i < rows; i += ROWS)
      pack(a.g + n + i, a.g_row, a.tokens, rows - i, ROWS, g + 2 * pairs * i);
    for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p)
      for (int64_t i = 0; i < rows; i += ROWS)
        run_panel(g + 2 * pairs * i, x + 2 * pairs * p * WIDE, pairs, a.c + (n + i) * a.k + p * WIDE, a.k,
                  rows - i, std::min(WIDE, a.k - p * WIDE));
  });
}

template void weight_grad(const WeightGrad<bf16>&);
template void weight_grad(const WeightGrad<float>&);

// One task takes some columns, so that the order of a sum does not depend on the threads; short sums are added
// up first, so that many rows lose no more than few.
template <class T>
void row_sum(const T* x, ptrdiff_t stride, int64_t rows, int64_t columns, float* out) {
  constexpr int64_t COLUMNS = 64, SHORT = 128;
  spread((columns + COLUMNS - 1) / COLUMNS, [&](int64_t task) {
    const int64_t from = task * COLUMNS, n = std::min(COLUMNS, columns - from);
    __m512 total[4] = {};
    for (int64_t t = 0; t < rows; t += SHORT) {
      __m512 sum[4] = {};
      for (int64_t i = t; i < std::min(rows, t + SHORT); ++i)
#pragma GCC unroll 4
        for (int64_t j = 0; j < 4; ++j)
          sum[j] = _mm512_add_ps(sum[j], load(x + i * stride + from + 16 * j, first(n - 16 * j)));
      for (int64_t j = 0; j < 4; ++j) total[j] = _mm512_add_ps(total[j], sum[j]);
    }
    for (int64_t j = 0; j < 4; ++j) store(out + from + 16 * j, total[j], first(n - 16 * j));
  });
}

template void row_sum(const bf16*, ptrdiff_t, int64_t, int64_t, float*);
template void row_sum(const float*, ptrdiff_t, int64_t, int64_t, float*);

}  // namespace grpo

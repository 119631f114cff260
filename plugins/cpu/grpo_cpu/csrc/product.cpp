// C [m, n] = A [m, k] B, for B [k, n] or B^T [n, k], in bf16 with float32 sums. A is read where it lies; B is
// packed into panels of 48 columns, by the task that needs them or beforehand.
#include <algorithm>

#include "gemm.h"
#include "kernels.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t WIDE = 48;
constexpr int64_t SOME = 64;  // rows at a time
constexpr int64_t SMALL = 128 << 10;  // elements of a matrix that fits into a core's cache beside its rows

// Rows 2 p and 2 p + 1 of B side by side, for every p: columns [0, n) of `padded`.
void pack_rows(const bf16* b, ptrdiff_t stride, int64_t k, int64_t n, int64_t padded, bf16* out) {
  for (int64_t t = 0; t < k; t += 2, out += 2 * padded)
    for (int64_t j = 0; j < padded; j += 16) {
      const __mmask16 m = first(n - j), pair = t + 1 < k ? m : (__mmask16)0;
      const bf16* at = b + t * stride + j;
      _mm512_storeu_si512(out + 2 * j, interleave(_mm256_maskz_loadu_epi16(m, at),
                                                  _mm256_maskz_loadu_epi16(pair, at + stride)));
    }
}

// The same for B^T: row j becomes column j.
void pack_columns(const bf16* b, ptrdiff_t stride, int64_t k, int64_t n, int64_t padded, bf16* out) {
  for (int64_t j = 0; j < padded; j += 16)
    for (int64_t t = 0; t < k; t += 32) {
      const int64_t left = k - t, pairs = std::min<int64_t>(16, (left + 1) / 2);
      const __mmask32 m = left >= 32 ? 0xFFFFFFFFu : (1u << left) - 1u;
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        r[i] = j + i < n ? _mm512_maskz_loadu_epi16(m, b + (j + i) * stride + t) : _mm512_setzero_si512();
      transpose16(r);
      bf16* at = out + t * padded + 2 * j;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (i < pairs) _mm512_storeu_si512(at + 2 * i * padded, r[i]);
    }
}

int64_t padded(int64_t columns) { return std::min(WIDE, (columns + 15) / 16 * 16); }

void pack_panel(const Product& p, int64_t column, bf16* out) {
  const int64_t n = std::min(WIDE, p.n - column), width = padded(n);
  if (p.transposed)
    pack_columns(p.b + column * p.b_row, p.b_row, p.k, n, width, out);
  else
    pack_rows(p.b + column, p.b_row, p.k, n, width, out);
}

// What a later task will read, fetched into the second-level cache a line at a time between multiplications.
struct Ahead {
  const char* at;
  ptrdiff_t pitch;           // from one row to the next; each has `across` lines
  int64_t across, next, end;  // lines
  int64_t quota;              // of one tile

  void fetch() {
    _mm_prefetch(at + next / across * pitch + next % across * 64, _MM_HINT_T1);
    ++next;
  }
};

Ahead ahead_of(const Product& p, int64_t column, int64_t tiles) {
  Ahead a{nullptr, 64, 1, 0, 0, 0};
  if (column >= p.n) return a;
  const int64_t n = std::min(WIDE, p.n - column);
  if (p.packed || (p.transposed && p.b_row == p.k)) {
    a.at = (const char*)((p.packed ? p.packed : p.b) + column * p.k);
    a.end = (n * p.k + 31) / 32;
  } else if (!p.transposed) {
    a.at = (const char*)(p.b + column), a.pitch = 2 * p.b_row, a.across = 2;
    a.end = 2 * p.k;
  }
  a.quota = (a.end + tiles - 1) / std::max<int64_t>(tiles, 1);
  return a;
}

// The rows of A that a thread takes after `from`.
Ahead ahead_of_rows(const Product& p, int64_t from, int64_t tiles) {
  const int64_t across = (p.k + 31) / 32, rows = std::clamp<int64_t>(p.m - from, 0, SOME);
  const int64_t end = rows * across;
  return {(const char*)(p.a + from * p.a_row), 2 * p.a_row, across, 0, end, (end + tiles - 1) / tiles};
}

template <int MR, int NV>
void finish_tile(const Product& p, int64_t row, int64_t column, const bf16* panel, Ahead& ahead) {
  __m512 acc[MR][NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    const int64_t at = column + 16 * j;
    const __m512 start = p.bias ? load(p.bias + at, first(p.n - at)) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) acc[i][j] = start;
  }
  const bf16* a = p.a + row * p.a_row;
  int64_t k = 0;
  for (const int64_t some = std::min({p.k / 2, ahead.quota, ahead.end - ahead.next}); k < some; ++k) {
    ahead.fetch();
    accumulate<MR, NV>(acc, a + 2 * k, p.a_row, 2, panel + 32 * NV * k, 32 * NV, 1);
  }
  accumulate<MR, NV>(acc, a + 2 * k, p.a_row, 2, panel + 32 * NV * k, 32 * NV, p.k / 2 - k);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const int64_t at = column + 16 * j;
      store(p.c + (row + i) * p.c_row + at, acc[i][j], first(p.n - at));
    }
}

template <int MR, int NV>
void finish_rows(const Product& p, int64_t from, int64_t to, int64_t column, const bf16* panel,
                 Ahead& ahead) {
  for (; from + MR <= to; from += MR) finish_tile<MR, NV>(p, from, column, panel, ahead);
  if constexpr (MR > 1)
    if (from < to) finish_rows<MR / 2, NV>(p, from, to, column, panel, ahead);
}

}  // namespace

int64_t packed_size(int64_t n, int64_t k) {
  return n / WIDE * WIDE * k + (n % WIDE ? padded(n % WIDE) * k : 0);
}

void pack(const Product& p, bf16* out) {
  spread((p.n + WIDE - 1) / WIDE, [&](int64_t i) { pack_panel(p, i * WIDE, out + i * WIDE * p.k); });
}

// Rows [from, to) times one panel.
static void run_panel(const Product& p, int64_t from, int64_t to, int64_t column, const bf16* panel,
                      Ahead& ahead) {
  const int64_t width = padded(p.n - column);
  const auto run = width > 32 ? finish_rows<8, 3> : width > 16 ? finish_rows<8, 2> : finish_rows<8, 1>;
  run(p, from, to, column, panel, ahead);
}

// A matrix that the cache of one core holds: each thread takes its rows through all of it, and finds them where it
// left them when it made them. Some rows at a time, whose results are whole lines of C before they leave the cache.
static void product_by_rows(Product p) {
  static thread_local Scratch<bf16> scratch;
  if (!p.packed) {
    bf16* all = scratch.get((size_t)packed_size(p.n, p.k));
    pack(p, all);
    p.packed = all;
  }
  const int64_t blocks = (p.m + SOME - 1) / SOME;
  spread_grid(blocks, 1, [&](int64_t block, int64_t) {
    const int64_t from = block * SOME, to = std::min(p.m, from + SOME);
    Ahead next = ahead_of_rows(p, to, (to - from + 7) / 8 * ((p.n + WIDE - 1) / WIDE));
    for (int64_t column = 0; column < p.n; column += WIDE)
      run_panel(p, from, to, column, p.packed + column * p.k, next);
  });
}

void product(const Product& p) {
  if (p.m == 0 || p.n == 0) return;
  const int64_t panels = (p.n + WIDE - 1) / WIDE, threads = at::get_num_threads();
  if (p.n * p.k <= SMALL && p.m >= 32 * threads) return product_by_rows(p);
  // Few columns: the rows are shared out too, at the cost of packing a panel more than once. Panels that only
  // just go round would leave threads idle while the last ones are worked on.
  const int64_t fewest = p.packed ? 64 : 256;
  const int64_t parts = std::clamp<int64_t>(8 * threads / panels, 1, (p.m + fewest - 1) / fewest);
  spread(panels * parts, [&](int64_t task) {
    static thread_local Scratch<bf16> scratch;
    const int64_t column = task / parts * WIDE, part = task % parts, width = padded(p.n - column);
    const bf16* panel = p.packed ? p.packed + column * p.k : nullptr;
    if (!panel) {
      bf16* mine = scratch.get((size_t)(width * p.k));
      pack_panel(p, column, mine);
      panel = mine;
    }
    const int64_t size = ((p.m + parts - 1) / parts + 7) / 8 * 8;
    const int64_t from = std::min(p.m, part * size), to = std::min(p.m, (part + 1) * size);
    Ahead ahead = ahead_of(p, (task + threads) / parts * WIDE, (to - from + 7) / 8);
    run_panel(p, from, to, column, panel, ahead);
  });
}

}  // namespace grpo

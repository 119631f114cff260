// linear.dense: the gradient of a small weight over many tokens. What weight_grad.cpp reads again and again, all
// tokens of a panel, does not stay in a core's cache then: here chunks of tokens go through a whole part of C, whose
// sums are kept instead.
#include <algorithm>

#include "gemm.h"
#include "kernels.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t TILE = 8;      // rows of C in registers,
constexpr int64_t WIDE = 48;     // times columns
constexpr int64_t ROWS = 16;     // rows of C that share a packed panel of G: one cache line for each pair
constexpr int64_t SMALL = 128 << 10;  // elements of C
constexpr int64_t TOKENS = 256;  // of one chunk: a packed panel of X stays in the first-level cache
constexpr int64_t MOST_ROWS = 256, MOST_PANELS = 4;  // of one task: its chunk and sums stay in the second level

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Columns [0, n) of x over `count` rows, in panels of `wide` columns that are [pairs][columns][2] each, the last
// one no wider than it must be; zeros where there is nothing. A panel starts TOKENS * wide after the one before.
void pack(const bf16* x, ptrdiff_t stride, int64_t count, int64_t n, int64_t wide, bf16* out) {
  const __m256i zero = _mm256_setzero_si256();
  const int64_t padded = round_up(n, 16);
  for (int64_t t = 0; t < count; t += 2) {
    const bf16 *low = x + t * stride, *high = low + stride;
    for (int64_t p = 0; p < padded; p += wide) {
      const int64_t width = std::min(wide, padded - p);
      bf16* at = out + TOKENS * p + t * width;
      for (int64_t j = p; j < p + width; j += 16) {
        const __mmask16 m = first(n - j);
        const __m256i a = m == 0xFFFF ? _mm256_loadu_si256((const __m256i*)(low + j))
                                      : _mm256_maskz_loadu_epi16(m, low + j);
        const __m256i b = t + 1 >= count ? zero
            : m == 0xFFFF                ? _mm256_loadu_si256((const __m256i*)(high + j))
                                         : _mm256_maskz_loadu_epi16(m, high + j);
        _mm512_storeu_si512(at + 2 * (j - p), interleave(a, b));
      }
    }
  }
}

// The rows of the next chunk, fetched into the second-level cache a line at a time between multiplications.
struct Ahead {
  const bf16* at;
  ptrdiff_t stride;
  int64_t across, next, end;  // lines of a row, of all

  Ahead(const bf16* x, ptrdiff_t stride, int64_t rows, int64_t columns)
      : at(x), stride(stride), across((columns + 31) / 32), next(0), end(std::max<int64_t>(rows, 0) * across) {}

  bool fetch() {
    if (next >= end) return false;
    _mm_prefetch((const char*)(at + next / across * stride + next % across * 32), _MM_HINT_T1);
    ++next;
    return true;
  }
};

// What a tile leaves in C: its own values, or the sum with what is there.
inline void leave(bf16* at, __m512 value, __mmask16 m) { store(at, value, m); }
inline void leave(float* at, __m512 value, __mmask16 m) { store(at, _mm512_add_ps(value, load(at, m)), m); }

struct Chunk {
  int64_t pairs;
  bool is_first, is_last;
  int64_t quota;  // lines to fetch ahead during one tile
  Ahead g, x;
};

// One chunk of a tile of C: on to its sums, and from the last one to C, of which `rows` and `columns` exist.
template <int NV, class C>
void run_tile(const bf16* g, const bf16* x, Chunk& chunk, float* sums, ptrdiff_t sums_row, C* c, ptrdiff_t c_row,
              int64_t rows, int64_t columns) {
  if (chunk.is_last)
    for (int64_t i = 0; i < std::min(rows, TILE); ++i)
      for (int j = 0; j < NV; ++j) _mm_prefetch((const char*)(c + i * c_row + 16 * j), _MM_HINT_T0);
  __m512 acc[TILE][NV];
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      acc[i][j] = chunk.is_first ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * sums_row + 16 * j);
  int64_t k = 0;
  for (; k < std::min(chunk.quota, chunk.pairs); ++k) {
    if (!chunk.g.fetch() && !chunk.x.fetch()) break;
    accumulate<TILE, NV>(acc, g + 2 * ROWS * k, 2, 2 * ROWS, x + 32 * NV * k, 32 * NV, 1);
  }
  accumulate<TILE, NV>(acc, g + 2 * ROWS * k, 2, 2 * ROWS, x + 32 * NV * k, 32 * NV, chunk.pairs - k);
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i) {
    if (chunk.is_last && i >= rows) break;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      if (chunk.is_last)
        leave(c + i * c_row + 16 * j, acc[i][j], first(columns - 16 * j));
      else
        _mm512_store_ps(sums + i * sums_row + 16 * j, acc[i][j]);
  }
}

// Rows [n, n + rows) and columns [k, k + columns) of C.
struct Part {
  int64_t n, rows, k, columns;
};

template <class C>
void run(const WeightGrad<C>& a, const Part& part) {
  static thread_local Scratch<bf16> g_chunk, x_chunk;
  static thread_local Scratch<float> sums_scratch;
  const int64_t groups = (part.rows + ROWS - 1) / ROWS, panels = (part.columns + WIDE - 1) / WIDE;
  bf16 *g = g_chunk.get((size_t)(TOKENS * groups * ROWS)), *x = x_chunk.get((size_t)(TOKENS * panels * WIDE));
  const ptrdiff_t sums_row = panels * WIDE;
  float* sums = sums_scratch.get((size_t)(groups * ROWS * sums_row));
  const int64_t tiles = panels * ((part.rows + TILE - 1) / TILE);
  // Even chunks, of whole pairs: a short last one would hardly be worth its sums.
  const int64_t chunks = (a.tokens + TOKENS - 1) / TOKENS;
  const int64_t most = round_up((a.tokens + chunks - 1) / chunks, 2);
  for (int64_t t = 0; t < a.tokens; t += most) {
    const int64_t count = std::min(most, a.tokens - t), left = std::min(most, a.tokens - t - count);
    const bf16 *g_at = a.g + t * a.g_row + part.n, *x_at = a.x + t * a.x_row + part.k;
    pack(g_at, a.g_row, count, part.rows, ROWS, g);
    pack(x_at, a.x_row, count, part.columns, WIDE, x);
    Chunk chunk{(count + 1) / 2, t == 0, left <= 0, 0, {g_at + most * a.g_row, a.g_row, left, part.rows},
                {x_at + most * a.x_row, a.x_row, left, part.columns}};
    chunk.quota = (chunk.g.end + chunk.x.end + tiles - 1) / tiles;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t columns = std::min(WIDE, part.columns - p * WIDE);
      const auto tile = columns > 32 ? run_tile<3, C> : columns > 16 ? run_tile<2, C> : run_tile<1, C>;
      for (int64_t i = 0; i < part.rows; i += TILE)
        tile(g + TOKENS * (i / ROWS * ROWS) + 2 * (i % ROWS), x + TOKENS * p * WIDE, chunk,
             sums + i * sums_row + p * WIDE, sums_row, a.c + (part.n + i) * a.k + part.k + p * WIDE, a.k,
             part.rows - i, columns);
    }
  }
}

// When the last thread is done with tasks of `high` x `wide` that each goes to the thread that is free first. In
// steps of one packed pair of rows: a tile of 8 x 48 multiplies for 12, and 16 elements pack in 2.5.
double makespan(int64_t n, int64_t k, int64_t high, int64_t wide) {
  const auto cost = [](int64_t rows, int64_t columns) {
    return (double)(rows * columns) / 32 + (double)(rows + columns) * 2.5 / 16;
  };
  const int64_t down = (n + high - 1) / high, across = (k + wide - 1) / wide;
  std::vector<double> until((size_t)at::get_num_threads(), 0.);
  if (down * across > 8 * (int64_t)until.size())
    return (double)((down + 1) * across) * cost(high, wide) / (double)until.size();
  for (int64_t i = 0; i < n; i += high)
    for (int64_t j = 0; j < k; j += wide)
      *std::min_element(until.begin(), until.end()) += cost(std::min(high, n - i), std::min(wide, k - j));
  return *std::max_element(until.begin(), until.end());
}

// Rows and columns of a task for which the threads are done first.
void shape_of_tasks(int64_t n, int64_t k, int64_t* rows, int64_t* columns) {
  double best = std::numeric_limits<double>::infinity();
  for (int64_t high = 32; high <= MOST_ROWS; high += ROWS)
    for (int64_t wide = WIDE; wide <= MOST_PANELS * WIDE && wide < k + WIDE; wide += WIDE) {
      const double span = makespan(n, k, high, wide);
      if (span < best) best = span, *rows = high, *columns = wide;
    }
}

}  // namespace

bool many_tokens(int64_t tokens, int64_t n, int64_t k) { return n * k <= SMALL && tokens >= 4 * TOKENS; }

template <class C>
void weight_grad_of_many(const WeightGrad<C>& a) {
  int64_t high = 0, wide = 0;
  shape_of_tasks(a.n, a.k, &high, &wide);
  const int64_t down = (a.n + high - 1) / high, across = (a.k + wide - 1) / wide;
  spread(down * across, [&](int64_t task) {
    const int64_t n = task / across * high, k = task % across * wide;
    run(a, {n, std::min(high, a.n - n), k, std::min(wide, a.k - k)});
  });
}

template void weight_grad_of_many(const WeightGrad<bf16>&);
template void weight_grad_of_many(const WeightGrad<float>&);

}  // namespace grpo

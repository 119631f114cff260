// Softmax attention of a few query rows over blocks of 32 keys: scores, softmax and weighted sum in float32,
// operands in bf16 or float32, weights rounded to bf16 where the values are (as flash attention does).
#pragma once
#include <algorithm>

#include "gemm.h"

namespace grpo {

constexpr int64_t BLOCK = 32;

// Keys as [D / UNIT][32][UNIT], values as [32 / UNIT][E][UNIT]; position of the first key and keys in use
// (1..32).
template <class T>
struct KeyBlock {
  const T* k;
  const T* v;
  int64_t start;
  int64_t count;
};

// Row m sees the positions from lo + m * lo_step to hi + m * hi_step (end excluded).
template <class T>
struct Rows {
  const T* q;
  ptrdiff_t q_row;
  T* o;
  ptrdiff_t o_row;
  float* lse;
  ptrdiff_t lse_row;
  int64_t count;
  int64_t lo, lo_step, hi, hi_step;
};

struct HeadSizes {
  int64_t d, e;
  float scale;
};

// Lanes of a block of `count` keys from position `start` that positions lo..hi-1 fall on, as a mask of 32.
static inline uint32_t lanes(int64_t start, int64_t count, int64_t lo, int64_t hi) {
  const int64_t from = std::clamp<int64_t>(lo - start, 0, count);
  const int64_t to = std::clamp<int64_t>(hi - start, from, count);
  const uint64_t below_to = (uint64_t(1) << to) - 1, below_from = (uint64_t(1) << from) - 1;
  return (uint32_t)(below_to & ~below_from);
}

// Columns of a block's scores that are worked out: the other half is neither written nor seen.
static inline int64_t width_of(int64_t count) { return count <= 16 ? 16 : 32; }

// 32 weights as values of type T.
static inline void store_weights(bf16* p, __m512 low, __m512 high) {
  _mm512_store_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
static inline void store_weights(float* p, __m512 low, __m512 high) {
  _mm512_store_ps(p, low);
  _mm512_store_ps(p + 16, high);
}

// Softmax of one row of scores [blocks * 32] in place: the row's weights end at its own start. Returns the sum
// of the weights; `top` is the largest scaled score.
template <class T>
static inline float soften(float* s, const KeyBlock<T>* blocks, int64_t n, int64_t lo, int64_t hi, float scale,
                           float* top) {
  const __m512 factor = _mm512_set1_ps(scale), low = _mm512_set1_ps(NEG_INF);
  __m512 top0 = low, top1 = low;
  for (int64_t b = 0; b < n; ++b) {
    const uint32_t seen = lanes(blocks[b].start, blocks[b].count, lo, hi);
    float* at = s + b * BLOCK;
    const __m512 x0 = _mm512_mask_mul_ps(low, (__mmask16)seen, _mm512_load_ps(at), factor);
    _mm512_store_ps(at, x0);
    top0 = _mm512_max_ps(top0, x0);
    if (width_of(blocks[b].count) <= 16) continue;
    const __m512 x1 = _mm512_mask_mul_ps(low, (__mmask16)(seen >> 16), _mm512_load_ps(at + 16), factor);
    _mm512_store_ps(at + 16, x1);
    top1 = _mm512_max_ps(top1, x1);
  }
  *top = _mm512_reduce_max_ps(_mm512_max_ps(top0, top1));
  const __m512 shift = _mm512_set1_ps(*top == NEG_INF ? 0.f : *top);
  __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
  T* weights = (T*)s;
  for (int64_t b = 0; b < n; ++b) {
    const __m512 x0 = exp512(_mm512_sub_ps(_mm512_load_ps(s + b * BLOCK), shift));
    __m512 x1 = _mm512_setzero_ps();
    if (width_of(blocks[b].count) > 16)
      x1 = exp512(_mm512_sub_ps(_mm512_load_ps(s + b * BLOCK + 16), shift));
    sum0 = _mm512_add_ps(sum0, x0);
    sum1 = _mm512_add_ps(sum1, x1);
    store_weights(weights + b * BLOCK, x0, x1);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum0, sum1));
}

// acc += the last pair of a block whose second key does not exist: its value bits may be anything.
template <int MR, int NV>
static inline void accumulate_half(__m512 (&acc)[MR][NV], const bf16* a, ptrdiff_t a_row, const bf16* v) {
  const __m512i keep = _mm512_set1_epi32(0xFFFF);
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    const __m512i column = _mm512_and_si512(_mm512_loadu_si512(v + 32 * j), keep);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
      acc[i][j] = multiply<bf16>(acc[i][j], broadcast_unit(a + i * a_row), column);
  }
}

// o [MR, 16 NV] = weights (rows) times the values of all blocks, times `inverse`.
template <int MR, int NV, class T>
static inline void weigh(const T* p, ptrdiff_t p_row, const KeyBlock<T>* blocks, int64_t n, int64_t e,
                         int64_t column, const float* inverse, T* o, ptrdiff_t o_row) {
  constexpr int64_t U = UNIT<T>;
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t b = 0; b < n; ++b) {
    const T* v = blocks[b].v + U * column;
    const int64_t whole = blocks[b].count / U;
    accumulate<MR, NV>(acc, p + b * BLOCK, p_row, U, v, U * e, whole);
    if constexpr (U == 2)
      if (blocks[b].count % 2)
        accumulate_half<MR, NV>(acc, p + b * BLOCK + 2 * whole, p_row, v + 2 * e * whole);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j)
      store(o + i * o_row + column + 16 * j, _mm512_mul_ps(acc[i][j], _mm512_set1_ps(inverse[i])));
}

template <int MR, class T>
static void weigh_rows(int64_t m, const T* p, ptrdiff_t p_row, const KeyBlock<T>* blocks, int64_t n,
                       int64_t e, const float* inverse, T* o, ptrdiff_t o_row) {
  for (; m >= MR; m -= MR, p += MR * p_row, inverse += MR, o += MR * o_row) {
    int64_t column = 0;
    for (; column + 64 <= e; column += 64)
      weigh<MR, 4>(p, p_row, blocks, n, e, column, inverse, o, o_row);
    if (column < e) weigh<MR, 2>(p, p_row, blocks, n, e, column, inverse, o, o_row);
  }
  if constexpr (MR > 1)
    if (m > 0) weigh_rows<(MR + 1) / 2>(m, p, p_row, blocks, n, e, inverse, o, o_row);
}

// Rows of one tile for a score buffer that stays in the second-level cache.
static inline int64_t tile_rows(int64_t blocks) {
  return std::clamp<int64_t>((int64_t(48) << 10) / (std::max<int64_t>(blocks, 1) * BLOCK), 6, 48) / 6 * 6;
}

// Attention of `rows` (at most 48) over blocks 0..n-1, which lie in the order of their positions, in three steps.
// Each step of one is latency more than work: those that have several take each step for all of them.
template <class T>
struct Attention {
  Rows<T> rows;
  const KeyBlock<T>* blocks;
  int64_t n;
  float* s;  // room for rows.count * width() scores, at 64 bytes
  float inverse[48];

  int64_t width() const { return std::max<int64_t>(n, 1) * BLOCK; }

  // Leaves out the blocks that no row sees.
  void trim() {
    const int64_t last_hi = rows.hi + rows.hi_step * (rows.count - 1);
    while (n > 0 && blocks[n - 1].start >= last_hi) --n;
    while (n > 0 && blocks[0].start + blocks[0].count <= rows.lo) ++blocks, --n;
  }

  void score(const HeadSizes& head) {
    constexpr int64_t U = UNIT<T>;
    for (int64_t b = 0; b < n; ++b)
      gemm<false>(rows.count, width_of(blocks[b].count), head.d / U, rows.q, rows.q_row, U, blocks[b].k,
                  U * BLOCK, s + b * BLOCK, width());
  }

  void weigh_scores(const HeadSizes& head) {
    for (int64_t m = 0; m < rows.count; ++m) {
      float top;
      const int64_t lo = rows.lo + m * rows.lo_step, hi = rows.hi + m * rows.hi_step;
      const float sum = soften(s + m * width(), blocks, n, lo, hi, head.scale, &top);
      inverse[m] = sum > 0 || sum != sum ? 1.f / sum : 0.f;
      if (rows.lse) rows.lse[m * rows.lse_row] = sum > 0 || sum != sum ? top + std::log(sum) : -NEG_INF;
    }
  }

  void add_values(const HeadSizes& head) {
    weigh_rows<6>(rows.count, (const T*)s, UNIT<T> * width(), blocks, n, head.e, inverse, rows.o, rows.o_row);
  }
};

template <class T>
static inline void attend(const Rows<T>& rows, const KeyBlock<T>* blocks, int64_t n, const HeadSizes& head,
                          Scratch<float>& scratch) {
  Attention<T> a{rows, blocks, n, nullptr, {}};
  a.trim();
  a.s = scratch.get(rows.count * a.width());
  a.score(head);
  a.weigh_scores(head);
  a.add_values(head);
}

}  // namespace grpo

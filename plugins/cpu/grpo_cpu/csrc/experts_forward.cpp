// moe.experts forward for experts with few rows: these are the lanes of B, rows of the weights A as they lie.
#include <vector>

#include "grouped.h"
#include "moe.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t CHUNK = 48;  // weight rows that a task computes: a multiple of 6, 8, 12 and 16
constexpr int64_t TURN = 16;  // of them between gate and up, for up to 16 rows

struct Block {
  int64_t expert, start, rows, padded, lanes_before;
};

// Experts with few rows, a block each; `many` receives the others.
std::vector<Block> blocks_of(const int64_t* counts, int64_t experts, int64_t& lanes,
                             std::vector<Share>& many) {
  std::vector<Block> blocks;
  lanes = 0;
  for (int64_t x = 0, start = 0; x < experts; start += counts[x++]) {
    const int64_t rows = counts[x], padded = (rows + 15) / 16 * 16;
    if (rows > LANES) {
      many.push_back({x, start, rows});
    } else if (rows) {
      blocks.push_back({x, start, rows, padded, lanes});
      lanes += padded;
    }
  }
  return blocks;
}

// Both are rounded to T first, so that what the backward pass reads is what was used.
template <class T>
static inline __m512 gated(__m512 gate, __m512 up) {
  return _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid512(gate)), up);
}

// One block's rows f0..f0+m of gate and up, then h: as lanes [f units][padded], or row by row for few rows.
template <class T>
void hidden_chunk(const Experts<T>& a, const Block& b, const unit* packed, int64_t f0, int64_t m,
                  T* gate_up_out, unit* h) {
  alignas(64) float gate[CHUNK * LANES], up[CHUNK * LANES];
  const int64_t kp = a.c / PER_UNIT<T>, hp = a.f / PER_UNIT<T>;
  const T* weight = a.gate_up + (b.expert * 2 * a.f + f0) * a.c;
  const unit *wg = units(weight), *wu = units(weight + a.f * a.c);
  T* out = gate_up_out ? gate_up_out + b.start * 2 * a.f + f0 : nullptr;
  // Gate and up take turns: both fetch what they need next while the other is multiplied.
  const int64_t turn = b.padded <= 16 ? TURN : CHUNK;
  if (b.rows <= FEW) {
    for (int64_t i = 0; i < m; i += turn) {
      const int64_t n = std::min(turn, m - i);
      few_dots<T>(b.rows, units(a.rows + b.start * a.c), kp, wg + i * kp, kp, n, kp, gate + i, CHUNK);
      few_dots<T>(b.rows, units(a.rows + b.start * a.c), kp, wu + i * kp, kp, n, kp, up + i, CHUNK);
    }
    for (int64_t r = 0; r < b.rows; ++r) {
      T* hidden = reinterpret_cast<T*>(h + r * hp) + f0;
      each16(0, m, [&](int64_t i, auto lanes) {
        const __m512 g = rounded<T>(load(gate + r * CHUNK + i, lanes));
        const __m512 u = rounded<T>(load(up + r * CHUNK + i, lanes));
        if (out) store(out + r * 2 * a.f + i, g, lanes), store(out + r * 2 * a.f + a.f + i, u, lanes);
        store(hidden + i, gated<T>(g, u), lanes);
      });
    }
    return;
  }
  for (int64_t i = 0; i < m; i += turn) {
    const int64_t n = std::min(turn, m - i);
    group_gemm<T, float>(n, b.padded, kp, wg + i * kp, kp, 1, packed, b.padded, gate + i * LANES, LANES);
    group_gemm<T, float>(n, b.padded, kp, wu + i * kp, kp, 1, packed, b.padded, up + i * LANES, LANES);
  }
  if (out) store_columns(gate, LANES, m, b.rows, out, 2 * a.f);
  if (out) store_columns(up, LANES, m, b.rows, out + a.f, 2 * a.f);
  unit* to = h + f0 / PER_UNIT<T> * b.padded;
  for (int64_t i = 0; i < m; i += PER_UNIT<T>, to += b.padded)
    for (int64_t j = 0; j < b.padded; j += 16) {
      __m512 x[PER_UNIT<T>];
      for (int64_t p = 0; p < PER_UNIT<T>; ++p) {
        const int64_t at = (i + p) * LANES + j;
        x[p] = gated<T>(rounded<T>(load(gate + at)), rounded<T>(load(up + at)));
      }
      if constexpr (PER_UNIT<T> == 2)
        _mm512_storeu_si512(to + j, interleave(narrow(x[0]), narrow(x[1])));
      else
        _mm512_storeu_si512(to + j, _mm512_castps_si512(x[0]));
    }
}

template <class T>
void down_chunk(const Experts<T>& a, const Block& b, const unit* h, int64_t c0, int64_t m, T* y) {
  alignas(64) float sums[CHUNK * LANES];
  const int64_t kp = a.f / PER_UNIT<T>;
  const unit* weight = units(a.down + (b.expert * a.c + c0) * a.f);
  T* out = y + b.start * a.c + c0;
  if (b.rows <= FEW) {
    few_dots<T>(b.rows, h, kp, weight, kp, m, kp, sums, CHUNK);
    for (int64_t r = 0; r < b.rows; ++r)
      each16(0, m, [&](int64_t i, auto lanes) {
        store(out + r * a.c + i, load(sums + r * CHUNK + i, lanes), lanes);
      });
    return;
  }
  group_gemm<T, float>(m, b.padded, kp, weight, kp, 1, h, b.padded, sums, LANES);
  store_columns(sums, LANES, m, b.rows, out, a.c);
}

}  // namespace

template <class T>
void experts_forward(const Experts<T>& a, T* gate_up_out, T* hidden, T* y) {
  int64_t lanes;
  std::vector<Share> many;
  const std::vector<Block> blocks = blocks_of(a.counts, a.experts, lanes, many);
  experts_many(a, many, gate_up_out, hidden, y);
  const int64_t count = (int64_t)blocks.size(), kp = a.c / PER_UNIT<T>, hp = a.f / PER_UNIT<T>;
  Scratch<unit> x_scratch, h_scratch;
  unit *x = x_scratch.get(lanes * kp + 16), *h = h_scratch.get(lanes * hp + 16);
  spread(count, [&](int64_t i) {
    const Block& b = blocks[i];
    if (b.rows > FEW)
      pack_columns(units(a.rows + b.start * a.c), kp, b.rows, kp, x + b.lanes_before * kp, b.padded, b.padded);
  });
  const int64_t f_chunks = (a.f + CHUNK - 1) / CHUNK, c_chunks = (a.c + CHUNK - 1) / CHUNK;
  // A thread's chunks are neighbours: what one fetches ahead is the next one's.
  spread_grid(count * f_chunks, 1, [&](int64_t task, int64_t) {
    const Block& b = blocks[task / f_chunks];
    const int64_t f0 = task % f_chunks * CHUNK;
    hidden_chunk(a, b, x + b.lanes_before * kp, f0, std::min(CHUNK, a.f - f0), gate_up_out,
                 h + b.lanes_before * hp);
  });
  spread_grid(count * c_chunks, 1, [&](int64_t task, int64_t) {
    const Block& b = blocks[task / c_chunks];
    const int64_t c0 = task % c_chunks * CHUNK;
    down_chunk(a, b, h + b.lanes_before * hp, c0, std::min(CHUNK, a.c - c0), y);
  });
}

template void experts_forward(const Experts<bf16>&, bf16*, bf16*, bf16*);
template void experts_forward(const Experts<float>&, float*, float*, float*);

}  // namespace grpo

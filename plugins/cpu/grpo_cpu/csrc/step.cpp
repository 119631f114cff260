// attention.step: norm, rotary, cache write and attention of one token for each sequence.
#include <numeric>

#include "cache.h"
#include "rotary.h"
#include "spread.h"

namespace grpo {
namespace {

template <class T>
void run(const CacheView<T>& c, const StepInput<T>& a, int64_t sequence, int64_t kv_head,
         std::vector<KeyBlock<T>>& blocks, Scratch<T>& heads, Scratch<float>& scores) {
  const int64_t group = a.heads / c.kv_heads, slot = a.slots[sequence], position = a.positions[sequence];
  const T* row = a.qkv + sequence * a.qkv_row;
  const float *cos = a.cos + sequence * a.pairs, *sin = a.sin + sequence * a.pairs;
  T* ready = heads.get((group + 1) * c.d);
  const auto prepare = [&](const T* x, const T* norm, T* y) {
    if (norm) {
      norm_head(x, norm, y, c.d, a.eps);
      x = y;
    }
    rotate_head(x, y, cos, sin, c.d, a.pairs, a.interleaved, false);
  };
  for (int64_t g = 0; g < group; ++g)
    prepare(row + (kv_head * group + g) * c.d, a.q_norm, ready + g * c.d);
  T* key = ready + group * c.d;
  prepare(row + (a.heads + kv_head) * c.d, a.k_norm, key);
  const Place at = find(c, slot, position);
  put_key(c, at, kv_head, key);
  put_value<true>(c, at, kv_head, row + (a.heads + c.kv_heads) * c.d + kv_head * c.e);
  gather_blocks(c, slot, kv_head, position + 1, blocks);
  Rows<T> rows{};
  rows.hi = position + 1, rows.lo = a.window ? position + 1 - a.window : 0;
  rows.q_row = c.d, rows.o_row = c.e;
  for (int64_t g = 0; g < group; g += 48) {
    rows.count = std::min<int64_t>(48, group - g);
    rows.q = ready + g * c.d;
    rows.o = a.o + (sequence * a.heads + kv_head * group + g) * c.e;
    attend(rows, blocks.data(), (int64_t)blocks.size(), {c.d, c.e, a.scale}, scores);
  }
}

}  // namespace

template <class T>
void cache_step(const CacheView<T>& c, const StepInput<T>& a) {
  std::vector<int64_t> order(a.sequences);
  std::iota(order.begin(), order.end(), 0);
  // Children of one parent next to each other: its keys and values stay in cache.
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return owner(c, a.slots[x]) < owner(c, a.slots[y]); });
  spread(a.sequences * c.kv_heads, [&](int64_t i) {
    thread_local Scratch<T> heads;
    thread_local Scratch<float> scores;
    thread_local std::vector<KeyBlock<T>> blocks;
    run(c, a, order[i % a.sequences], i / a.sequences, blocks, heads, scores);
  });
}

template void cache_step(const CacheView<bf16>&, const StepInput<bf16>&);
template void cache_step(const CacheView<float>&, const StepInput<float>&);

}  // namespace grpo

// attention.step: norm, rotary, cache write and attention of one token for each sequence.
#include "cache.h"
#include "rotary.h"
#include "spread.h"

namespace grpo {
namespace {

template <class T>
struct Workplace {
  Scratch<T> heads;
  Scratch<float> scores;
  std::vector<KeyBlock<T>> blocks;
  std::vector<Attention<T>> parts;
};

// Norm, rotary and cache write of the kv heads [from, to) of a sequence; its query heads are left in `ready`,
// [(to - from) * group, d].
template <class T>
void prepare(const CacheView<T>& c, const StepInput<T>& a, int64_t sequence, int64_t from, int64_t to, T* ready) {
  const int64_t group = a.heads / c.kv_heads;
  const T* row = a.qkv + sequence * a.qkv_row;
  const float *cos = a.cos + sequence * a.pairs, *sin = a.sin + sequence * a.pairs;
  const auto turn = [&](const T* x, const T* norm, T* y) {
    if (norm) {
      norm_head(x, norm, y, c.d, a.eps);
      x = y;
    }
    rotate_head(x, y, cos, sin, c.d, a.pairs, a.interleaved, false);
  };
  for (int64_t h = 0; h < (to - from) * group; ++h)
    turn(row + (from * group + h) * c.d, a.q_norm, ready + h * c.d);
  T* key = ready + (to - from) * group * c.d;
  const Place at = find(c, a.slots[sequence], a.positions[sequence]);
  for (int64_t h = from; h < to; ++h) {
    turn(row + (a.heads + h) * c.d, a.k_norm, key);
    put_key(c, at, h, key);
    put_value<true>(c, at, h, row + (a.heads + c.kv_heads) * c.d + h * c.e);
  }
}

// Fetches the block of kv head `h` that `sequence` writes into: of a short sequence that is most of what it reads,
// in lines too far apart for the CPU to see them coming.
template <class T>
void fetch(const CacheView<T>& c, const StepInput<T>& a, int64_t sequence, int64_t h) {
  const Place at = find(c, a.slots[sequence], a.positions[sequence]);
  if (at.block < 0) return;
  const int64_t used = at.offset + 1, lines = width_of(used) / 16;
  const char* key = (const char*)key_block(c, at.block, h);
  for (int64_t i = 0; i < c.d / UNIT<T>; ++i)
    for (int64_t j = 0; j < lines; ++j) _mm_prefetch(key + i * 4 * BLOCK + 64 * j, _MM_HINT_T0);
  const char* value = (const char*)value_block(c, at.block, h);
  const int64_t bytes = (used + UNIT<T> - 1) / UNIT<T> * c.e * 4;
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(value + i, _MM_HINT_T0);
}

template <class T>
void run(const CacheView<T>& c, const StepInput<T>& a, int64_t sequence, int64_t next, int64_t from,
         int64_t to, Workplace<T>& w) {
  const int64_t group = a.heads / c.kv_heads, slot = a.slots[sequence], length = a.positions[sequence] + 1;
  T* ready = w.heads.get(((to - from) * group + 1) * c.d);
  prepare(c, a, sequence, from, to, ready);
  w.blocks.clear();
  for (int64_t h = from; h < to; ++h) gather_blocks(c, slot, h, length, w.blocks);
  const int64_t n = (int64_t)w.blocks.size() / (to - from);
  w.parts.clear();
  for (int64_t h = from; h < to; ++h)
    for (int64_t g = 0; g < group; g += 48) {
      Rows<T> rows{};
      rows.hi = length, rows.lo = a.window ? length - a.window : 0;
      rows.q_row = c.d, rows.o_row = c.e;
      rows.count = std::min<int64_t>(48, group - g);
      rows.q = ready + ((h - from) * group + g) * c.d;
      rows.o = a.o + (sequence * a.heads + h * group + g) * c.e;
      w.parts.push_back({rows, w.blocks.data() + (h - from) * n, n, nullptr, {}});
      w.parts.back().trim();
    }
  const int64_t width = w.parts[0].width();
  float* scores = w.scores.get((to - from) * group * width);
  const HeadSizes head{c.d, c.e, a.scale};
  if (next >= 0)
    for (int64_t h = from; h < to; ++h) fetch(c, a, next, h);
  for (Attention<T>& part : w.parts) {
    part.s = scores;
    scores += part.rows.count * width;
    part.score(head);
  }
  for (Attention<T>& part : w.parts) part.weigh_scores(head);
  for (Attention<T>& part : w.parts) part.add_values(head);
}

}  // namespace

template <class T>
void cache_step(const CacheView<T>& c, const StepInput<T>& a) {
  const std::vector<int64_t> order = by_owner(c, a.slots, a.sequences);
  const int64_t longest = a.sequences ? *std::max_element(a.positions, a.positions + a.sequences) + 1 : 0;
  // Of many sequences a task takes as many heads as have their scores in the first-level cache.
  const int64_t scores = a.heads / c.kv_heads * (longest + BLOCK);
  const bool many = a.sequences >= 4 * at::get_num_threads();
  const int64_t some = many ? std::clamp<int64_t>(4096 / std::max<int64_t>(scores, 1), 1, c.kv_heads) : 1;
  spread_grid(a.sequences, (c.kv_heads + some - 1) / some, [&](int64_t i, int64_t column) {
    thread_local Workplace<T> workplace;
    const int64_t next = i + 1 < a.sequences ? order[i + 1] : -1;
    run(c, a, order[i], next, column * some, std::min(c.kv_heads, (column + 1) * some), workplace);
  });
}

template void cache_step(const CacheView<bf16>&, const StepInput<bf16>&);
template void cache_step(const CacheView<float>&, const StepInput<float>&);

}  // namespace grpo

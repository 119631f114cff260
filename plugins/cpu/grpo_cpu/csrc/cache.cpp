// The paged cache: writing keys and values, and attention of new tokens over it (prefill and decode).
#include "cache.h"

#include "spread.h"

namespace grpo {

template <class T>
int64_t cache_check(const CacheView<T>& c, const int64_t* slots, const int64_t* positions, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t)
    if (slots[t] < 0 || slots[t] >= c.slots || find(c, slots[t], positions[t]).block < 0) return t;
  return -1;
}

template <class T>
int64_t cache_check_lengths(const CacheView<T>& c, const int64_t* slots, const int64_t* lengths,
                            int64_t sequences) {
  for (int64_t i = 0; i < sequences; ++i) {
    if (slots[i] < 0 || slots[i] >= c.slots || lengths[i] < 0) return i;
    const SlotView s = slot_view(c, slots[i]);
    if (lengths[i] > s.starts[s.used]) return i;
  }
  return -1;
}

template <class T>
void cache_write(const CacheView<T>& c, const T* k, ptrdiff_t k_token, ptrdiff_t k_head, const T* v,
                 ptrdiff_t v_token, ptrdiff_t v_head, const int64_t* slots, const int64_t* positions,
                 int64_t tokens) {
  at::parallel_for(0, tokens, 32, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      const Place at = find(c, slots[t], positions[t]);
      for (int64_t h = 0; h < c.kv_heads; ++h) {
        put_key(c, at, h, k + t * k_token + h * k_head);
        put_value<false>(c, at, h, v + t * v_token + h * v_head);
      }
    }
  });
}

namespace {

struct Task {
  int64_t sequence, from, count;  // query tokens of the sequence
};

// Long sequences in tiles.
template <class T>
std::vector<Task> tasks_of(const CacheView<T>& c, const CacheQuery<T>& a) {
  std::vector<Task> tasks;
  for (const int64_t s : by_owner(c, a.slots, a.sequences)) {
    const int64_t tokens = a.starts ? a.starts[s + 1] - a.starts[s] : 1;
    const int64_t step = tile_rows((a.lengths[s] + BLOCK - 1) / BLOCK);
    for (int64_t from = 0; from < tokens; from += step)
      tasks.push_back({s, from, std::min(step, tokens - from)});
  }
  return tasks;
}

template <class T>
void run(const CacheView<T>& c, const CacheQuery<T>& a, const Task& task, int64_t kv_head,
         std::vector<KeyBlock<T>>& blocks, Scratch<float>& scratch) {
  const int64_t group = a.heads / c.kv_heads, slot = a.slots[task.sequence];
  const int64_t length = a.lengths[task.sequence];
  const int64_t start = a.starts ? a.starts[task.sequence] : task.sequence;
  const int64_t tokens = a.starts ? a.starts[task.sequence + 1] - start : 1;
  blocks.clear();
  gather_blocks(c, slot, kv_head, length, blocks);
  const HeadSizes head{c.d, c.e, a.scale};
  const int64_t hi = length - tokens + task.from + 1, first_token = start + task.from;
  Rows<T> rows{};
  rows.hi = hi;
  rows.lo = a.window ? hi - a.window : 0;
  rows.q_row = a.q_head, rows.o_row = c.e;
  if (!a.starts) {  // one token: its heads are the rows
    for (int64_t g = 0; g < group; g += 48) {
      const int64_t h = kv_head * group + g;
      rows.count = std::min<int64_t>(48, group - g);
      rows.q = a.q + first_token * a.q_token + h * a.q_head;
      rows.o = a.o + (first_token * a.heads + h) * c.e;
      attend(rows, blocks.data(), (int64_t)blocks.size(), head, scratch);
    }
    return;
  }
  rows.count = task.count, rows.hi_step = 1, rows.lo_step = a.window ? 1 : 0;
  rows.q_row = a.q_token, rows.o_row = a.heads * c.e;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t h = kv_head * group + g;
    rows.q = a.q + first_token * a.q_token + h * a.q_head;
    rows.o = a.o + (first_token * a.heads + h) * c.e;
    attend(rows, blocks.data(), (int64_t)blocks.size(), head, scratch);
  }
}

}  // namespace

template <class T>
void cache_attend(const CacheView<T>& c, const CacheQuery<T>& a) {
  const std::vector<Task> tasks = tasks_of(c, a);
  const int64_t count = (int64_t)tasks.size();
  spread_grid(count, c.kv_heads, [&](int64_t i, int64_t kv_head) {
    thread_local Scratch<float> scratch;
    thread_local std::vector<KeyBlock<T>> blocks;
    run(c, a, tasks[i], kv_head, blocks, scratch);
  });
}

template int64_t cache_check(const CacheView<bf16>&, const int64_t*, const int64_t*, int64_t);
template int64_t cache_check_lengths(const CacheView<bf16>&, const int64_t*, const int64_t*, int64_t);
template void cache_write(const CacheView<bf16>&, const bf16*, ptrdiff_t, ptrdiff_t, const bf16*, ptrdiff_t,
                          ptrdiff_t, const int64_t*, const int64_t*, int64_t);
template void cache_attend(const CacheView<bf16>&, const CacheQuery<bf16>&);
template int64_t cache_check(const CacheView<float>&, const int64_t*, const int64_t*, int64_t);
template int64_t cache_check_lengths(const CacheView<float>&, const int64_t*, const int64_t*, int64_t);
template void cache_write(const CacheView<float>&, const float*, ptrdiff_t, ptrdiff_t, const float*, ptrdiff_t,
                          ptrdiff_t, const int64_t*, const int64_t*, int64_t);
template void cache_attend(const CacheView<float>&, const CacheQuery<float>&);

}  // namespace grpo

// Packed training attention: which segments belong together, and their keys in the layouts of the kernels.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include <ATen/Parallel.h>

#include "attend.h"
#include "kernels.h"

namespace grpo {

// A root segment and its children, which all read the root's keys.
struct Family {
  int64_t root;
  std::vector<int64_t> children;
  int64_t cost;
};

static inline std::vector<Family> families_of(const Segments& a) {
  std::vector<Family> families;
  std::vector<int64_t> index(a.count, -1);
  for (int64_t s = 0; s < a.count; ++s) {
    const int64_t length = a.ends[s + 1] - a.ends[s], parent = a.parents ? a.parents[s] : -1;
    if (parent < 0) {
      index[s] = (int64_t)families.size();
      families.push_back({s, {}, length * length});
    } else {
      Family& family = families[index[parent]];
      family.children.push_back(s);
      family.cost += length * (length + 2 * (a.ends[parent + 1] - a.ends[parent]));
    }
  }
  // The dear ones first, so that no thread is left with one at the end.
  std::stable_sort(families.begin(), families.end(), [](const Family& x, const Family& y) { return x.cost > y.cost; });
  return families;
}

// Runs work(task) for tasks 0..count-1; each thread takes the next one. Which thread runs a task changes
// nothing in its result.
template <class Work>
static void spread(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      for (int64_t task = next++; task < count; task = next++) work(task);
  });
}

static inline int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

// Rows of `x` from token `from` on as blocks [d / 2][32][2], zero padded.
static inline void pack_columns(const Strided& x, int64_t head, int64_t from, int64_t length, int64_t d, bf16* out) {
  for (int64_t l = 0; l < length; l += BLOCK, out += BLOCK * d)
    pack_block(x.data + (from + l) * x.token + head * x.head, x.token, std::min(BLOCK, length - l), d, out);
}

// The same as pairs of tokens [blocks][16][d][2], zero padded.
static inline void pack_tokens(const Strided& x, int64_t head, int64_t from, int64_t length, int64_t d, bf16* out) {
  pack_pairs(x.data + from * x.token + head * x.head, x.token, length, d, out, blocks_of(length) * BLOCK / 2);
}

}  // namespace grpo

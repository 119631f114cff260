// Packed training attention: which segments belong together, and their keys in the layouts of the kernels.
#pragma once
#include <algorithm>
#include <vector>

#include "attend.h"
#include "kernels.h"
#include "spread.h"

namespace grpo {

// A root segment and its children, which all read the root's keys.
struct Family {
  int64_t root;
  std::vector<int64_t> children;
  int64_t cost;
};

template <class T>
static inline std::vector<Family> families_of(const Segments<T>& a) {
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
  std::stable_sort(families.begin(), families.end(),
                   [](const Family& x, const Family& y) { return x.cost > y.cost; });
  return families;
}

// Runs work(family, kv_head) for all of them. Of many families a thread takes whole ones: the heads of a token share
// cache lines and pages.
template <class Work>
static void spread_families(const std::vector<Family>& families, int64_t kv_heads, const Work& work) {
  const int64_t count = (int64_t)families.size(), together = count >= 4 * at::get_num_threads() ? kv_heads : 1;
  spread(count * kv_heads / together, [&](int64_t task) {
    for (int64_t i = task * together; i < (task + 1) * together; ++i) work(families[i / kv_heads], i % kv_heads);
  });
}

static inline int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }

// Rows of `x` from token `from` on as blocks [d / UNIT][32][UNIT], as pack_block leaves them.
template <class T>
static inline void pack_columns(const Strided<T>& x, int64_t head, int64_t from, int64_t length, int64_t d,
                                T* out) {
  for (int64_t l = 0; l < length; l += BLOCK, out += BLOCK * d)
    pack_block(x.data + (from + l) * x.token + head * x.head, x.token, std::min(BLOCK, length - l), d, out);
}

// The same as units of tokens [blocks][32 / UNIT][d][UNIT]; what is missing of the last unit is zero.
template <class T>
static inline void pack_tokens(const Strided<T>& x, int64_t head, int64_t from, int64_t length, int64_t d,
                               T* out) {
  pack_units(x.data + from * x.token + head * x.head, x.token, length, d, out,
             (length + UNIT<T> - 1) / UNIT<T>);
}

}  // namespace grpo

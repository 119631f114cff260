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

// The tokens whose keys go into one run of blocks: `kept` of a parent's from `parent` on, then a segment's own.
struct Span {
  int64_t parent, kept, from, length;

  int64_t size() const { return kept + length; }
};

// A short child whose keys fill no more than a block together with its parent's is given all of them in one, so that
// each product over its keys is done once and not twice.
template <class T>
static inline Span span_of(const Segments<T>& a, int64_t segment, int64_t root, int64_t prefix) {
  const int64_t from = a.ends[segment], length = a.ends[segment + 1] - from;
  return {a.ends[root], segment != root && prefix + length <= BLOCK ? prefix : 0, from, length};
}

// The rows of a span that lies in two places, one after the other.
template <class T>
static inline Strided<T> gathered(const Strided<T>& x, int64_t head, const Span& span, int64_t d, T* out) {
  const auto put = [&](int64_t from, int64_t count) {
    for (int64_t i = 0; i < count; ++i, out += d)
      std::memcpy(out, x.data + (from + i) * x.token + head * x.head, d * sizeof(T));
  };
  const T* start = out;
  put(span.parent, span.kept);
  put(span.from, span.length);
  return {start, d, 0};
}

// Rows of `x` as blocks [d / UNIT][32][UNIT], as pack_block leaves them, and as units of tokens
// [blocks][32 / UNIT][d][UNIT], with zero for what is missing of the last unit; either may be null.
template <class T>
static inline void pack_span(const Strided<T>& x, int64_t head, const Span& span, int64_t d, T* columns, T* tokens) {
  alignas(64) T together[BLOCK * 256];
  const Strided<T> rows = span.kept ? gathered(x, head, span, d, together)
                                    : Strided<T>{x.data + span.from * x.token + head * x.head, x.token, 0};
  const int64_t size = span.size();
  if (columns)
    for (int64_t l = 0; l < size; l += BLOCK, columns += BLOCK * d)
      pack_block(rows.data + l * rows.token, rows.token, std::min(BLOCK, size - l), d, columns);
  if (tokens) pack_units(rows.data, rows.token, size, d, tokens, (size + UNIT<T> - 1) / UNIT<T>);
}

}  // namespace grpo

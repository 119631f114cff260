// attention.varlen and attention.shared_prefix, forward. One task is a family and a kv head: its keys and
// values are packed once and read by all of its query heads and children.
#include "segments.h"

namespace grpo {
namespace {

template <class T>
struct Packed {
  Scratch<T> k, v;
  Scratch<float> scores;
  std::vector<KeyBlock<T>> blocks;
};

// Packs the keys of a span; its blocks follow those of the parent, unless it holds these itself.
template <class T>
void pack(const Segments<T>& a, const Span& span, int64_t kv_head, int64_t kept, int64_t prefix, T* k, T* v,
          std::vector<KeyBlock<T>>& blocks) {
  pack_span(a.k, kv_head, span, a.d, k, (T*)nullptr);
  pack_span(a.v, kv_head, span, a.e, (T*)nullptr, v);
  blocks.resize(span.kept ? 0 : kept);
  for (int64_t l = 0; l < span.size(); l += BLOCK)
    blocks.push_back({k + l * a.d, v + l * a.e, prefix - span.kept + l, std::min(BLOCK, span.size() - l)});
}

template <class T>
void run_segment(const Segments<T>& a, int64_t segment, int64_t kv_head, int64_t prefix, Packed<T>& p, T* o,
                 float* lse) {
  const int64_t from = a.ends[segment], length = a.ends[segment + 1] - from, tokens = a.ends[a.count];
  const int64_t group = a.heads / a.kv_heads, rows = tile_rows((int64_t)p.blocks.size());
  for (int64_t g = 0; g < group; ++g) {
    const int64_t h = kv_head * group + g;
    for (int64_t i = 0; i < length; i += rows) {
      const int64_t token = from + i, position = prefix + i;
      Rows<T> r{};
      r.q = a.q.data + token * a.q.token + h * a.q.head, r.q_row = a.q.token;
      r.o = o + (token * a.heads + h) * a.e, r.o_row = a.heads * a.e;
      r.lse = lse ? lse + h * tokens + token : nullptr, r.lse_row = 1;
      r.count = std::min(rows, length - i);
      r.lo = a.window ? position + 1 - a.window : 0, r.lo_step = a.window ? 1 : 0;
      r.hi = a.causal ? position + 1 : prefix + length, r.hi_step = a.causal ? 1 : 0;
      attend(r, p.blocks.data(), (int64_t)p.blocks.size(), {a.d, a.e, a.scale}, p.scores);
    }
  }
}

template <class T>
void run_family(const Segments<T>& a, const Family& family, int64_t kv_head, Packed<T>& p, T* o, float* lse) {
  const int64_t prefix = a.ends[family.root + 1] - a.ends[family.root], kept = blocks_of(prefix);
  int64_t longest = 0;
  for (const int64_t s : family.children)
    longest = std::max<int64_t>(longest, blocks_of(a.ends[s + 1] - a.ends[s]));
  T *k = p.k.get((kept + longest) * BLOCK * a.d), *v = p.v.get((kept + longest) * BLOCK * a.e);
  const int64_t root = family.root;
  pack(a, span_of(a, root, root, 0), kv_head, 0, 0, k, v, p.blocks);
  run_segment(a, root, kv_head, 0, p, o, lse);
  const std::vector<KeyBlock<T>> own = p.blocks;
  for (const int64_t s : family.children) {
    const Span span = span_of(a, s, root, prefix);
    if (!span.kept) p.blocks = own;
    pack(a, span, kv_head, kept, prefix, k + kept * BLOCK * a.d, v + kept * BLOCK * a.e, p.blocks);
    run_segment(a, s, kv_head, prefix, p, o, lse);
  }
}

}  // namespace

template <class T>
void segments_forward(const Segments<T>& a, T* o, float* lse) {
  const std::vector<Family> families = families_of(a);
  spread_families(families, a.kv_heads, [&](const Family& family, int64_t kv_head) {
    thread_local Packed<T> packed;
    run_family(a, family, kv_head, packed, o, lse);
  });
}

template void segments_forward(const Segments<bf16>&, bf16*, float*);
template void segments_forward(const Segments<float>&, float*, float*);

}  // namespace grpo

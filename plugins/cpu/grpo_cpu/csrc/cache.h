// Where the tokens of a slot lie in the paged cache.
#pragma once
#include <algorithm>
#include <vector>

#include "attend.h"
#include "kernels.h"

namespace grpo {

struct SlotView {
  int64_t used, shared, owner;
  const int32_t *starts, *blocks;
};

template <class T>
static inline SlotView slot_view(const CacheView<T>& c, int64_t slot) {
  const int32_t* row = c.table + slot * (2 * c.width + 4);
  return {row[0], row[1], row[2], row + 3, row + 4 + c.width};
}

template <class T>
static inline int64_t owner(const CacheView<T>& c, int64_t slot) { return slot_view(c, slot).owner; }

// The sequences with children of one parent next to each other: its keys and values stay in cache.
template <class T>
static inline std::vector<int64_t> by_owner(const CacheView<T>& c, const int64_t* slots, int64_t sequences) {
  std::vector<int64_t> order(sequences);
  for (int64_t i = 0; i < sequences; ++i) order[i] = owner(c, slots[i]) << 32 | i;
  // Mostly they are, in the order of starting.
  if (!std::is_sorted(order.begin(), order.end())) std::sort(order.begin(), order.end());
  for (int64_t& i : order) i &= 0xFFFFFFFF;
  return order;
}

struct Place {
  int64_t block, offset;  // block of the storage, token within it
};

// The place of `position` in the slot's own blocks; block -1: no room there, or shared with the parent.
template <class T>
static inline Place find(const CacheView<T>& c, int64_t slot, int64_t position) {
  const SlotView s = slot_view(c, slot);
  if (s.shared >= s.used || position < s.starts[s.shared] || position >= s.starts[s.used]) return {-1, 0};
  const int64_t at = position - s.starts[s.shared];
  return {s.blocks[s.shared + at / BLOCK], at % BLOCK};
}

template <class T>
static inline T* key_block(const CacheView<T>& c, int64_t block, int64_t head) {
  return c.k + (block * c.kv_heads + head) * BLOCK * c.d;
}

template <class T>
static inline T* value_block(const CacheView<T>& c, int64_t block, int64_t head) {
  return c.v + (block * c.kv_heads + head) * BLOCK * c.e;
}

template <class T>
static inline void put_key(const CacheView<T>& c, const Place& at, int64_t head, const T* k) {
  constexpr int64_t U = UNIT<T>;
  T* out = key_block(c, at.block, head) + U * at.offset;
  for (int64_t i = 0; i < c.d / U; ++i) std::memcpy(out + i * U * BLOCK, k + U * i, 4);
}

// Unless ALONE, another thread may write the other token of each pair at the same time: only a masked store
// leaves its bits alone, at several times the price.
template <bool ALONE>
static inline void put_value(const CacheView<bf16>& c, const Place& at, int64_t head, const bf16* v) {
  bf16* out = value_block(c, at.block, head) + at.offset / 2 * 2 * c.e;
  const bool odd = at.offset % 2;
  for (int64_t i = 0; i < c.e; i += 16) {
    __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(v + i)));
    if (odd) x = _mm512_slli_epi32(x, 16);
    const __mmask32 mine = odd ? 0xAAAAAAAAu : 0x55555555u;
    if (ALONE)
      _mm512_storeu_si512(out + 2 * i, _mm512_mask_blend_epi16(mine, _mm512_loadu_si512(out + 2 * i), x));
    else
      _mm512_mask_storeu_epi16(out + 2 * i, mine, x);
  }
}

template <bool ALONE>
static inline void put_value(const CacheView<float>& c, const Place& at, int64_t head, const float* v) {
  std::memcpy(value_block(c, at.block, head) + at.offset * c.e, v, c.e * sizeof(float));
}

// Adds the blocks that hold positions 0..length-1 of a slot.
template <class T>
static inline void gather_blocks(const CacheView<T>& c, int64_t slot, int64_t head, int64_t length,
                                 std::vector<KeyBlock<T>>& out) {
  const SlotView s = slot_view(c, slot);
  for (int64_t b = 0; b < s.used && s.starts[b] < length; ++b)
    out.push_back({key_block(c, s.blocks[b], head), value_block(c, s.blocks[b], head), s.starts[b],
                   std::min<int64_t>(s.starts[b + 1], length) - s.starts[b]});
}

}  // namespace grpo

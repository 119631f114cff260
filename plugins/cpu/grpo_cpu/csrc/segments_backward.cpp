// attention.varlen and attention.shared_prefix, backward (Dao et al. 2022, algorithm 4). With L the log
// of the sum of exponentials and P = exp(S - L):
//   dV = P^T dO,  dS = P o (dO V^T - rowsum(dO o O)) * scale,  dQ = dS K,  dK = dS^T Q.
// One task is a family and a kv head. It alone writes the gradients of that family's keys, in float32 until
// the last child is done: no atomics, and the order of every sum is fixed.
#include "segments.h"

namespace grpo {
namespace {

constexpr int64_t ROWS = 32;  // queries of a tile

template <class T>
struct Keys {  // packed keys and values of the parent, then of the segment
  T *k_columns, *k_tokens, *v_columns;
  float *dk, *dv;
};

template <class T>
struct Buffers {
  Scratch<T> k_columns, k_tokens, v_columns, q_tokens, g_tokens;
  Scratch<float> dk, dv, dq;
};

template <class T>
struct Grads {
  const T* o;
  const float* lse;
  Strided<T> g;
  T *dq, *dk, *dv;
};

// Up to ROWS queries of one head of one segment.
template <class T>
struct Tile {
  int64_t head, token, count;
  int64_t lo, lo_step, hi, hi_step;  // as in Rows
  const T *q, *g;                    // rows of q and of the output's gradient
  ptrdiff_t g_row;
  const T *q_tokens, *g_tokens;      // the same as units of rows
  const float *lse, *delta;
  float* dq;  // [ROWS, d]
};

struct BlockOf {
  int64_t index, start, count;
};

// P and dS of 16 keys of one row.
struct Pair {
  __m512 p, ds;
};

inline Pair softmax_grad(__m512 s, __m512 dp, float lse, float delta, float scale, __mmask16 seen) {
  const __m512 z = _mm512_fmsub_ps(s, _mm512_set1_ps(scale), _mm512_set1_ps(lse));
  const __m512 p = _mm512_maskz_mov_ps(seen, exp512(z));
  const __m512 ds = _mm512_mul_ps(_mm512_mul_ps(p, _mm512_set1_ps(scale)),
                                  _mm512_sub_ps(dp, _mm512_set1_ps(delta)));
  return {p, _mm512_maskz_mov_ps(seen, ds)};
}

// dS by rows and, as units of rows [ROWS / UNIT][32][UNIT], P and dS. In float32 a unit is a row.
template <class T>
struct Turned {
  T *ds_rows, *p_units, *ds_units;
};

template <class T>
Pair turn_row(const Segments<T>& a, const Tile<T>& t, const BlockOf& block, int64_t row, int64_t half,
              const float* s, const float* dp) {
  const uint32_t seen = lanes(block.start, block.count, t.lo + row * t.lo_step, t.hi + row * t.hi_step);
  const int64_t from = row * BLOCK + 16 * half;
  return softmax_grad(_mm512_load_ps(s + from), _mm512_load_ps(dp + from), t.lse[row], t.delta[row], a.scale,
                      (__mmask16)(seen >> (16 * half)));
}

// Turns scores s and dp [ROWS, 32] into P and dS.
void turn(const Segments<bf16>& a, const Tile<bf16>& t, const BlockOf& block, const float* s, const float* dp,
          const Turned<bf16>& out) {
  for (int64_t m = 0; m < t.count; m += 2)
    for (int64_t half = 0; 16 * half < block.count; ++half) {
      __m256i p[2], ds[2];
      for (int64_t i = 0; i < 2; ++i) {
        if (m + i >= t.count) {
          p[i] = ds[i] = _mm256_setzero_si256();
          continue;
        }
        const Pair pair = turn_row(a, t, block, m + i, half, s, dp);
        p[i] = narrow(pair.p), ds[i] = narrow(pair.ds);
        _mm256_store_si256((__m256i*)(out.ds_rows + (m + i) * BLOCK + 16 * half), ds[i]);
      }
      _mm512_store_si512(out.p_units + m * BLOCK + 32 * half, interleave(p[0], p[1]));
      _mm512_store_si512(out.ds_units + m * BLOCK + 32 * half, interleave(ds[0], ds[1]));
    }
}

void turn(const Segments<float>& a, const Tile<float>& t, const BlockOf& block, const float* s,
          const float* dp, const Turned<float>& out) {
  for (int64_t m = 0; m < t.count; ++m)
    for (int64_t half = 0; 16 * half < block.count; ++half) {
      const Pair pair = turn_row(a, t, block, m, half, s, dp);
      _mm512_store_ps(out.p_units + m * BLOCK + 16 * half, pair.p);
      _mm512_store_ps(out.ds_rows + m * BLOCK + 16 * half, pair.ds);
    }
}

template <class T>
void run_block(const Segments<T>& a, const Tile<T>& t, const Keys<T>& keys, const BlockOf& block) {
  constexpr int64_t U = UNIT<T>;
  alignas(64) float s[ROWS * BLOCK], dp[ROWS * BLOCK];
  alignas(64) T ds_rows[ROWS * BLOCK], p_units[ROWS * BLOCK], ds_units[U == 1 ? 1 : ROWS * BLOCK];
  const Turned<T> turned{ds_rows, p_units, U == 1 ? ds_rows : ds_units};
  const int64_t first_key = block.index * BLOCK, units = (t.count + U - 1) / U;
  const int64_t width = width_of(block.count);
  gemm<false>(t.count, width, a.d / U, t.q, a.q.token, U, keys.k_columns + first_key * a.d, U * BLOCK, s,
              BLOCK);
  gemm<false>(t.count, width, a.e / U, t.g, t.g_row, U, keys.v_columns + first_key * a.e, U * BLOCK, dp,
              BLOCK);
  turn(a, t, block, s, dp, turned);
  gemm<true>(block.count, a.e, units, turned.p_units, U, U * BLOCK, t.g_tokens, U * a.e,
             keys.dv + first_key * a.e, a.e);
  gemm<true>(block.count, a.d, units, turned.ds_units, U, U * BLOCK, t.q_tokens, U * a.d,
             keys.dk + first_key * a.d, a.d);
  // The keys of the last unit that do not exist have dS 0 and are packed as zeros.
  gemm<true>(t.count, a.d, (block.count + U - 1) / U, turned.ds_rows, BLOCK, U,
             keys.k_tokens + first_key * a.d, U * a.d, t.dq, a.d);
}

template <class T>
void run_tile(const Segments<T>& a, const Tile<T>& t, const Keys<T>& keys, int64_t prefix, const Span& span, T* dq) {
  std::fill_n(t.dq, t.count * a.d, 0.f);
  const int64_t kept = blocks_of(prefix), end = t.hi + t.hi_step * (t.count - 1);
  for (int64_t b = span.kept ? kept : 0; b < kept + blocks_of(span.size()); ++b) {
    const int64_t start = b < kept ? b * BLOCK : prefix - span.kept + (b - kept) * BLOCK;
    const int64_t count = std::min(BLOCK, (b < kept ? prefix : prefix + span.length) - start);
    if (start >= end) break;
    if (start + count > t.lo) run_block(a, t, keys, {b, start, count});
  }
  for (int64_t m = 0; m < t.count; ++m)
    for (int64_t j = 0; j < a.d; j += 16)
      store(dq + ((t.token + m) * a.heads + t.head) * a.d + j, _mm512_loadu_ps(t.dq + m * a.d + j));
}

template <class T>
void run_segment(const Segments<T>& a, const Grads<T>& x, const Span& span, int64_t kv_head, int64_t prefix,
                 const Keys<T>& keys, Buffers<T>& scratch) {
  constexpr int64_t U = UNIT<T>;
  const int64_t from = span.from, length = span.length, tokens = a.ends[a.count];
  const int64_t group = a.heads / a.kv_heads;
  T *q_tokens = scratch.q_tokens.get(ROWS * a.d), *g_tokens = scratch.g_tokens.get(ROWS * a.e);
  float delta[ROWS];
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t i = 0; i < length; i += ROWS) {
      const int64_t token = from + i, position = prefix + i;
      Tile<T> t{};
      t.head = h, t.token = token, t.count = std::min(ROWS, length - i);
      t.lo = a.window ? position + 1 - a.window : 0, t.lo_step = a.window ? 1 : 0;
      t.hi = a.causal ? position + 1 : prefix + length, t.hi_step = a.causal ? 1 : 0;
      t.q = a.q.data + token * a.q.token + h * a.q.head;
      t.g = x.g.data + token * x.g.token + h * x.g.head, t.g_row = x.g.token;
      pack_units(t.q, a.q.token, t.count, a.d, q_tokens, (t.count + U - 1) / U);
      pack_units(t.g, x.g.token, t.count, a.e, g_tokens, (t.count + U - 1) / U);
      for (int64_t m = 0; m < t.count; ++m) {
        const T* o = x.o + ((token + m) * a.heads + h) * a.e;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = 0; j < a.e; j += 16)
          sum = _mm512_fmadd_ps(load(o + j), load(t.g + m * x.g.token + j), sum);
        delta[m] = _mm512_reduce_add_ps(sum);
      }
      t.q_tokens = q_tokens, t.g_tokens = g_tokens, t.delta = delta;
      t.lse = x.lse + h * tokens + token;
      t.dq = scratch.dq.get(ROWS * a.d);
      run_tile(a, t, keys, prefix, span, x.dq);
    }
}

// Packs a span's keys behind `kept` blocks and clears their gradients.
template <class T>
void open(const Segments<T>& a, const Span& span, int64_t kv_head, int64_t kept, const Keys<T>& keys) {
  const int64_t at = kept * BLOCK;
  pack_span(a.k, kv_head, span, a.d, keys.k_columns + at * a.d, keys.k_tokens + at * a.d);
  pack_span(a.v, kv_head, span, a.e, keys.v_columns + at * a.e, (T*)nullptr);
  std::fill_n(keys.dk + at * a.d, span.size() * a.d, 0.f);
  std::fill_n(keys.dv + at * a.e, span.size() * a.e, 0.f);
}

// Writes the gradients of a span's own keys, and adds those of its parent's to what the parent has.
template <class T>
void close(const Segments<T>& a, const Span& span, int64_t kv_head, int64_t kept, const Keys<T>& keys,
           const Grads<T>& x) {
  const auto finish = [&](float* sums, int64_t size, T* out) {
    const float* own = sums + kept * BLOCK * size;
    for (int64_t i = 0; i < span.kept * size; i += 16, own += 16)
      _mm512_storeu_ps(sums + i, _mm512_add_ps(_mm512_loadu_ps(sums + i), _mm512_loadu_ps(own)));
    for (int64_t l = 0; l < span.length; ++l, own += size)
      for (int64_t j = 0; j < size; j += 16)
        store(out + ((span.from + l) * a.kv_heads + kv_head) * size + j, _mm512_loadu_ps(own + j));
  };
  finish(keys.dk, a.d, x.dk);
  finish(keys.dv, a.e, x.dv);
}

// Fetches one head of tokens [from, to), to read it or to write it.
template <bool WRITE, class T>
void fetch_rows(const Strided<T>& x, int64_t head, int64_t from, int64_t to, int64_t d) {
  for (int64_t t = from; t < to; ++t)
    for (int64_t j = 0; j < d; j += 64 / (int64_t)sizeof(T))
      __builtin_prefetch(x.data + t * x.token + head * x.head + j, WRITE);
}

// Fetches what a later segment reads and writes for one kv head. Short ones have a few rows in each of eight tensors,
// too few for the CPU to see more of them coming.
template <class T>
void fetch(const Segments<T>& a, const Grads<T>& x, int64_t segment, int64_t kv_head) {
  const int64_t group = a.heads / a.kv_heads;
  const int64_t from = a.ends[segment], to = std::min<int64_t>(a.ends[segment + 1], from + BLOCK);
  fetch_rows<false>(a.k, kv_head, from, to, a.d);
  fetch_rows<false>(a.v, kv_head, from, to, a.e);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    fetch_rows<false>(a.q, h, from, to, a.d);
    fetch_rows<false>(x.g, h, from, to, a.e);
    fetch_rows<false>(Strided<T>{x.o, a.heads * a.e, a.e}, h, from, to, a.e);
  }
  fetch_rows<true>(Strided<T>{x.dk, a.kv_heads * a.d, a.d}, kv_head, from, to, a.d);
  fetch_rows<true>(Strided<T>{x.dv, a.kv_heads * a.e, a.e}, kv_head, from, to, a.e);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    fetch_rows<true>(Strided<T>{x.dq, a.heads * a.d, a.d}, h, from, to, a.d);
}

template <class T>
void run_family(const Segments<T>& a, const Grads<T>& x, const Family& family, int64_t kv_head,
                Buffers<T>& scratch) {
  const int64_t prefix = a.ends[family.root + 1] - a.ends[family.root], kept = blocks_of(prefix);
  int64_t longest = 0;
  for (const int64_t s : family.children)
    longest = std::max<int64_t>(longest, blocks_of(a.ends[s + 1] - a.ends[s]));
  const int64_t room = (kept + longest) * BLOCK;
  const Keys<T> keys{scratch.k_columns.get(room * a.d), scratch.k_tokens.get(room * a.d),
                     scratch.v_columns.get(room * a.e), scratch.dk.get(room * a.d), scratch.dv.get(room * a.e)};
  const Span root = span_of(a, family.root, family.root, 0);
  open(a, root, kv_head, 0, keys);
  run_segment(a, x, root, kv_head, 0, keys, scratch);
  // The parent is run with prefix 0: its own blocks are the first `kept`.
  const size_t children = family.children.size();
  for (size_t i = 0; i < children; ++i) {
    if (i + 1 < children) fetch(a, x, family.children[i + 1], kv_head);
    const Span span = span_of(a, family.children[i], family.root, prefix);
    open(a, span, kv_head, kept, keys);
    run_segment(a, x, span, kv_head, prefix, keys, scratch);
    close(a, span, kv_head, kept, keys, x);
  }
  close(a, root, kv_head, 0, keys, x);
}

}  // namespace

template <class T>
void segments_backward(const Segments<T>& a, const T* o, const float* lse, Strided<T> grad, T* dq, T* dk,
                       T* dv) {
  const std::vector<Family> families = families_of(a);
  const Grads<T> grads{o, lse, grad, dq, dk, dv};
  spread_families(families, a.kv_heads, [&](const Family& family, int64_t kv_head) {
    thread_local Buffers<T> scratch;
    run_family(a, grads, family, kv_head, scratch);
  });
}

template void segments_backward(const Segments<bf16>&, const bf16*, const float*, Strided<bf16>, bf16*, bf16*,
                                bf16*);
template void segments_backward(const Segments<float>&, const float*, const float*, Strided<float>, float*,
                                float*, float*);

}  // namespace grpo

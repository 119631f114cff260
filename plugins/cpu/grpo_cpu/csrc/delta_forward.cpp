// gated_delta.chunk, forward. One task is a segment and a key head; its value heads share products of keys.
// With c the cumulative log decay of a chunk and M the state at its start (arXiv 2412.06464, section 3.3):
//   (I + tril(beta k k^T D, -1)) new = beta (v - exp(c) k M),  o = exp(c) q M + tril(q k^T D) new,
//   M' = exp(c_last) M + (exp(c_last - c) k)^T new,  D_ij = exp(c_i - c_j).
#include <utility>

#include "delta.h"

namespace grpo {
namespace {

template <class T>
void run_head(const DeltaChunks<T>& a, const Chunk& c, int64_t head, float* state, DeltaRoom& r, T* o) {
  const int64_t d = a.d(), e = a.e();
  open_head<T>(a, c, head, state, r, nullptr);
  gemm<false>(c.rows, e, d, r.q, d, 1, state, e, r.out, e);
  for (int64_t i = 0; i < c.rows; ++i) scale_row(r.out + i * e, r.out + i * e, r.decays.start[i], e);
  add_lower(c.rows, e, r.weights, r.x, r.out);
  narrow_rows(r.out, e, c.n, a.E, o + (c.token * a.K + head) * a.E, a.K * a.E);
  for (int64_t i = 0; i < c.rows; ++i) scale_row(r.scaled + i * d, r.k + i * d, r.decays.rest[i], d);
  for (int64_t i = 0; i < d; ++i) scale_row(state + i * e, state + i * e, r.decays.fade, e);
  gemm<true>(d, e, c.rows, r.scaled, 1, d, r.x, e, state, e);
}

}  // namespace

template <class T>
void delta_forward(const DeltaChunks<T>& a, const float* initial, T* o, float* last, float* before) {
  const int64_t d = a.d(), e = a.e(), size = d * e, rep = a.rep();
  const std::vector<int64_t> starts = chunk_starts(a.ends, a.segments);
  spread(a.segments * a.H, [&](int64_t task) {
    static thread_local DeltaRoom r;
    const int64_t s = task / a.H, h = task % a.H;
    r.take(d, e, rep * size);
    float* states = r.more;
    std::fill_n(states, rep * size, 0.f);
    for (int64_t p = 0; initial && p < rep; ++p)
      narrow_rows(initial + (s * a.K + h * rep + p) * a.D * a.E, a.E, a.D, a.E, states + p * size, e);
    for (int64_t at = 0; at < starts[s + 1] - starts[s]; ++at) {
      const int64_t token = a.ends[s] + at * CHUNK, n = std::min<int64_t>(CHUNK, a.ends[s + 1] - token);
      const Chunk c{token, n, (n + 15) / 16 * 16};
      open_chunk(a, c, h, r);
      for (int64_t p = 0; p < rep; ++p) {
        const int64_t head = h * rep + p;
        if (before) std::copy_n(states + p * size, size, before + ((starts[s] + at) * a.K + head) * size);
        run_head(a, c, head, states + p * size, r, o);
      }
    }
    for (int64_t p = 0; last && p < rep; ++p)
      narrow_rows(states + p * size, e, a.D, a.E, last + (s * a.K + h * rep + p) * a.D * a.E, a.E);
  });
}

template void delta_forward(const DeltaChunks<bf16>&, const float*, bf16*, float*, float*);
template void delta_forward(const DeltaChunks<float>&, const float*, float*, float*, float*);

}  // namespace grpo

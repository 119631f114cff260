// gated_delta.chunk, backward, from a segment's last chunk to its first. States at the start of each chunk were
// kept; all else is computed again. With G the gradient of the system gram * decay * beta, S that of the scores:
//   d_new = W^T do + (rest k) dM',  (I - system)^T dr = d_new,  dM = fade dM' + (start q)^T do - (beta start k)^T dr.
#include <utility>

#include "delta.h"

namespace grpo {
namespace {

// Room of the backward pass beside `DeltaRoom`.
struct Back {
  float *dq, *dk, *part;                              // [rows][d]
  float *dout, *raw, *dr;                             // [rows][e]
  float *x_t, *state_t, *ds, *d_system, *sum_s, *sum_g;  // [e][CHUNK], [e][d], [rows][CHUNK]
  float* states;                                      // [rep][d][e], gradients of the states
  static int64_t size(int64_t d, int64_t e, int64_t rep) {
    return 3 * CHUNK * d + 4 * CHUNK * e + e * d + 4 * CHUNK * CHUNK + rep * d * e;
  }
  Back(float* at, int64_t d, int64_t e) {
    const auto next = [&](int64_t size) { return std::exchange(at, at + size); };
    dq = next(CHUNK * d), dk = next(CHUNK * d), part = next(CHUNK * d);
    dout = next(CHUNK * e), raw = next(CHUNK * e), dr = next(CHUNK * e), x_t = next(CHUNK * e);
    state_t = next(e * d);
    ds = next(CHUNK * CHUNK), d_system = next(CHUNK * CHUNK);
    sum_s = next(CHUNK * CHUNK), sum_g = next(CHUNK * CHUNK), states = at;
  }
};

// Through decay and products: adds to the sums of S and G; dc and dbeta of each row.
void through_decay(const Chunk& c, const DeltaRoom& r, const Back& b, double* dc, float* dbeta) {
  alignas(64) float columns[CHUNK] = {};
  for (int64_t i = 0; i < c.rows; ++i) {
    __m512 row = _mm512_setzero_ps(), strength = row;
    const __m512 beta = _mm512_set1_ps(r.decays.beta[i]);
    for (int64_t j = 0; j <= i; j += 16) {
      const int64_t at = i * CHUNK + j;
      const __mmask16 below = first(i - j);
      const __m512 fall = _mm512_loadu_ps(r.decay + at), gram = _mm512_loadu_ps(r.gram + at);
      const __m512 s = _mm512_mul_ps(fall, _mm512_loadu_ps(b.ds + at));
      const __m512 fallen = _mm512_maskz_mul_ps(below, fall, _mm512_loadu_ps(b.d_system + at));
      const __m512 g = _mm512_mul_ps(beta, fallen);
      strength = _mm512_mask3_fmadd_ps(fallen, gram, strength, below);
      _mm512_storeu_ps(b.sum_s + at, _mm512_add_ps(_mm512_loadu_ps(b.sum_s + at), s));
      _mm512_storeu_ps(b.sum_g + at, _mm512_add_ps(_mm512_loadu_ps(b.sum_g + at), g));
      __m512 z = _mm512_maskz_mul_ps(below, s, _mm512_loadu_ps(r.scores + at));
      z = _mm512_maskz_fmadd_ps(below, g, gram, z);
      row = _mm512_add_ps(row, z);
      _mm512_store_ps(columns + j, _mm512_add_ps(_mm512_load_ps(columns + j), z));
    }
    dc[i] += _mm512_reduce_add_ps(row);
    dbeta[i] += _mm512_reduce_add_ps(strength);
  }
  for (int64_t i = 0; i < c.rows; ++i) dc[i] -= columns[i];
}

// What goes through the states: dq, dk, dc, and the state's own gradient in place.
void through_state(const Chunk& c, int64_t d, int64_t e, const float* state, float* dstate, const DeltaRoom& r,
                   const Back& b, double* dc) {
  const Decays& x = r.decays;
  double last = 0;
  transpose(dstate, e, d, e, b.state_t, d);
  gemm<false>(c.rows, d, e, r.x, e, 1, b.state_t, d, b.part, d);
  for (int64_t i = 0; i < c.rows; ++i) {
    const double pull = x.rest[i] * dot(r.k + i * d, b.part + i * d, d);
    add_row(b.dk + i * d, b.part + i * d, x.rest[i], d);
    last += pull, dc[i] -= pull;
  }
  for (int64_t i = 0; i < d; ++i) {
    last += x.fade * dot(state + i * e, dstate + i * e, e);
    scale_row(dstate + i * e, dstate + i * e, x.fade, e);
  }
  dc[c.rows - 1] += last;
  transpose(state, e, d, e, b.state_t, d);
  gemm<false>(c.rows, d, e, b.dout, e, 1, b.state_t, d, b.part, d);
  for (int64_t i = 0; i < c.rows; ++i) {
    add_row(b.dq + i * d, b.part + i * d, x.start[i], d);
    dc[i] += x.start[i] * dot(r.q + i * d, b.part + i * d, d);
    scale_row(r.scaled + i * d, r.q + i * d, x.start[i], d);
  }
  gemm<true>(d, e, c.rows, r.scaled, 1, d, b.dout, e, dstate, e);
  gemm<false>(c.rows, d, e, b.dr, e, 1, b.state_t, d, b.part, d);
  for (int64_t i = 0; i < c.rows; ++i) {
    const float weight = -x.beta[i] * x.start[i];
    add_row(b.dk + i * d, b.part + i * d, weight, d);
    dc[i] += weight * dot(r.k + i * d, b.part + i * d, d);
    scale_row(r.scaled + i * d, r.k + i * d, weight, d);
  }
  gemm<true>(d, e, c.rows, r.scaled, 1, d, b.dr, e, dstate, e);
}

template <class T>
void run_head(const DeltaChunks<T>& a, const DeltaGrads<T>& g, const Chunk& c, int64_t head,
              const float* state, float* dstate, DeltaRoom& r, const Back& b) {
  const int64_t d = a.d(), e = a.e();
  double dc[CHUNK] = {};
  float dbeta[CHUNK];
  open_head<T>(a, c, head, state, r, b.raw);
  widen_rows(g.o.data + c.token * g.o.token + head * g.o.head, g.o.token, c.n, c.rows, a.E, e, 1.f, b.dout);
  for (int64_t i = 0; i < c.rows; ++i) scale_row(r.scaled + i * d, r.k + i * d, r.decays.rest[i], d);
  gemm<false>(c.rows, e, d, r.scaled, d, 1, dstate, e, b.dr, e);
  add_lower_transposed(c.rows, e, r.weights, b.dout, b.dr);
  solve_transposed(c.rows, e, r.system, b.dr);
  transpose(r.x, e, c.rows, e, b.x_t, CHUNK);
  lower_product(c.rows, e, b.dout, b.x_t, b.ds);
  for (int64_t i = 0; i < c.rows; ++i) {
    scale_row(r.out + i * e, b.dr + i * e, -1.f, e);
    dbeta[i] = dot(b.dr + i * e, b.raw + i * e, e);
  }
  lower_product(c.rows, e, r.out, b.x_t, b.d_system);
  through_decay(c, r, b, dc, dbeta);
  through_state(c, d, e, state, dstate, r, b, dc);
  double total = 0;
  for (int64_t i = c.rows - 1; i >= 0; --i) {
    total += dc[i];
    if (i >= c.n) continue;
    const int64_t at = (c.token + i) * a.K + head;
    narrow_rows(b.dr + i * e, e, 1, a.E, g.dv + at * a.E, a.E, r.decays.beta[i]);
    g.dg[at] = (float)total, g.dbeta[at] = dbeta[i];
  }
}

template <class T>
void run_chunk(const DeltaChunks<T>& a, const DeltaGrads<T>& g, const Chunk& c, int64_t chunk, int64_t h,
               DeltaRoom& r, const Back& b) {
  const int64_t d = a.d(), size = d * a.e(), rep = a.rep();
  open_chunk(a, c, h, r);
  std::fill_n(b.dq, c.rows * d, 0.f);
  std::fill_n(b.dk, c.rows * d, 0.f);
  std::fill_n(b.sum_s, CHUNK * CHUNK, 0.f);
  std::fill_n(b.sum_g, CHUNK * CHUNK, 0.f);
  for (int64_t p = 0; p < rep; ++p) {
    const int64_t head = h * rep + p;
    run_head(a, g, c, head, g.before + (chunk * a.K + head) * size, b.states + p * size, r, b);
  }
  add_lower(c.rows, d, b.sum_s, r.k, b.dq);
  add_lower_transposed(c.rows, d, b.sum_s, r.q, b.dk);
  add_lower(c.rows, d, b.sum_g, r.k, b.dk);
  add_lower_transposed(c.rows, d, b.sum_g, r.k, b.dk);
  const int64_t at = (c.token * a.H + h) * a.D;
  narrow_rows(b.dq, d, c.n, a.D, g.dq + at, a.H * a.D, a.scale);
  narrow_rows(b.dk, d, c.n, a.D, g.dk + at, a.H * a.D);
}

}  // namespace

template <class T>
void delta_backward(const DeltaChunks<T>& a, const DeltaGrads<T>& g) {
  const int64_t d = a.d(), e = a.e(), size = d * e, rep = a.rep();
  const std::vector<int64_t> starts = chunk_starts(a.ends, a.segments);
  spread(a.segments * a.H, [&](int64_t task) {
    static thread_local DeltaRoom r;
    const int64_t s = task / a.H, h = task % a.H;
    r.take(d, e, Back::size(d, e, rep));
    const Back b(r.more, d, e);
    std::fill_n(b.states, rep * size, 0.f);
    for (int64_t p = 0; g.last && p < rep; ++p)
      narrow_rows(g.last + (s * a.K + h * rep + p) * a.D * a.E, a.E, a.D, a.E, b.states + p * size, e);
    for (int64_t at = starts[s + 1] - starts[s] - 1; at >= 0; --at) {
      const int64_t token = a.ends[s] + at * CHUNK, n = std::min<int64_t>(CHUNK, a.ends[s + 1] - token);
      run_chunk(a, g, {token, n, (n + 15) / 16 * 16}, starts[s] + at, h, r, b);
    }
    for (int64_t p = 0; g.initial && p < rep; ++p)
      narrow_rows(b.states + p * size, e, a.D, a.E, g.initial + (s * a.K + h * rep + p) * a.D * a.E, a.E);
  });
}

template void delta_backward(const DeltaChunks<bf16>&, const DeltaGrads<bf16>&);
template void delta_backward(const DeltaChunks<float>&, const DeltaGrads<float>&);

}  // namespace grpo

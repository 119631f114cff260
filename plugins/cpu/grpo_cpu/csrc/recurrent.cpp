// gated_delta.step and short_conv.step: one token of each sequence, states updated in place.
#include <ATen/Parallel.h>

#include "bindings.h"
#include "simd.h"

namespace grpo {
namespace {

constexpr int64_t LANES = 16;

// Columns e .. e + 16 N of one head's state [D, E]: reads each row twice, writes it once.
template <int N, class T, class Lanes>
void advance(float* state, const float* q, const float* k, const T* v, T* o, int64_t D, int64_t E,
             float decay, float beta, Lanes lanes) {
  __m512 recalled[N], read[N];
  for (int i = 0; i < N; ++i) recalled[i] = read[i] = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; ++d) {
    const __m512 key = _mm512_set1_ps(k[d]);
    for (int i = 0; i < N; ++i)
      recalled[i] = _mm512_fmadd_ps(key, load(state + d * E + i * LANES, lanes), recalled[i]);
  }
  const __m512 fade = _mm512_set1_ps(decay), strength = _mm512_set1_ps(beta);
  for (int i = 0; i < N; ++i)
    recalled[i] = _mm512_mul_ps(strength, _mm512_fnmadd_ps(fade, recalled[i], load(v + i * LANES, lanes)));
  for (int64_t d = 0; d < D; ++d) {
    const __m512 key = _mm512_set1_ps(k[d]), query = _mm512_set1_ps(q[d]);
    for (int i = 0; i < N; ++i) {
      float* at = state + d * E + i * LANES;
      const __m512 row = _mm512_fmadd_ps(key, recalled[i], _mm512_mul_ps(fade, load(at, lanes)));
      read[i] = _mm512_fmadd_ps(query, row, read[i]);
      store(at, row, lanes);
    }
  }
  for (int i = 0; i < N; ++i) store(o + i * LANES, read[i], lanes);
}

template <class T>
void advance_head(float* state, const float* q, const float* k, const T* v, T* o, int64_t D, int64_t E,
                  float decay, float beta) {
  int64_t e = 0;
  for (; e + 8 * LANES <= E; e += 8 * LANES)
    advance<8>(state + e, q, k, v + e, o + e, D, E, decay, beta, All{});
  for (; e + 2 * LANES <= E; e += 2 * LANES)
    advance<2>(state + e, q, k, v + e, o + e, D, E, decay, beta, All{});
  for (; e < E; e += LANES) advance<1>(state + e, q, k, v + e, o + e, D, E, decay, beta, first(E - e));
}

template <class T>
const T* data(const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }

template <class T>
void run_delta(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
               const Tensor& state, const Tensor& slots, float scale, const Tensor& o) {
  const int64_t H = q.size(1), D = q.size(2), K = v.size(1), E = v.size(2);
  at::parallel_for(0, v.size(0) * K, 1, [&](int64_t from, int64_t to) {
    Scratch<float> rows;
    float *query = rows.get(2 * D), *key = query + D;
    for (int64_t task = from; task < to; ++task) {
      const int64_t b = task / K, j = task % K, head = b * H + j / (K / H);
      for (int64_t d = 0; d < D; ++d) {
        query[d] = scale * to_float(data<T>(q)[head * D + d]);
        key[d] = to_float(data<T>(k)[head * D + d]);
      }
      advance_head<T>(state.data_ptr<float>() + (slots.data_ptr<int64_t>()[b] * K + j) * D * E, query, key,
                      data<T>(v) + task * E, static_cast<T*>(o.data_ptr()) + task * E, D, E,
                      std::exp(data<float>(g)[task]), data<float>(beta)[task]);
    }
  });
}

void check_slots(const Tensor& slots, int64_t count) {
  const int64_t* at = slots.data_ptr<int64_t>();
  for (int64_t b = 0; b < slots.numel(); ++b)
    TORCH_CHECK_INDEX(at[b] >= 0 && at[b] < count, "slot ", at[b], " of ", count);
}

void check_float(const Tensor& x, const char* name) {
  TORCH_CHECK(x.is_cpu() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat), name,
              " must be bfloat16 or float32 on the CPU, not ", x.scalar_type(), " on ", x.device());
}

Tensor delta_step(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& g_,
                  const Tensor& beta_, const Tensor& state, const Tensor& slots_, double scale) {
  TORCH_CHECK(q_.dim() == 3 && v_.dim() == 3 && state.dim() == 4, "q, v and state have ", q_.dim(), ", ",
              v_.dim(), " and ", state.dim(), " dimensions");
  check_float(v_, "v");
  const int64_t B = q_.size(0), H = q_.size(1), D = q_.size(2), K = v_.size(1), E = v_.size(2);
  TORCH_CHECK_VALUE(H > 0 && K % H == 0, K, " value heads cannot be shared out over ", H, " key heads");
  TORCH_CHECK(state.scalar_type() == at::kFloat && state.is_contiguous() && state.size(1) == K &&
                  state.size(2) == D && state.size(3) == E,
              "state must be contiguous float32 [N, ", K, ", ", D, ", ", E, "], not ", state.sizes());
  const auto type = v_.scalar_type();
  const Tensor q = dense(q_, type, {B, H, D}, "q"), k = dense(k_, type, {B, H, D}, "k");
  const Tensor v = dense(v_, type, {B, K, E}, "v"), slots = dense(slots_, at::kLong, {B}, "slots");
  const Tensor g = dense(g_, at::kFloat, {B, K}, "g"), beta = dense(beta_, at::kFloat, {B, K}, "beta");
  check_slots(slots, state.size(0));
  Tensor o = at::empty({B, K, E}, v.options());
  if (type == at::kBFloat16)
    run_delta<bf16>(q, k, v, g, beta, state, slots, (float)scale, o);
  else
    run_delta<float>(q, k, v, g, beta, state, slots, (float)scale, o);
  return o;
}


// Channels of one sequence: the window [C, W - 1] is oldest first.
template <class T>
void convolve(const T* x, const T* w, T* window, T* y, float* sums, int64_t C, int64_t W) {
  for (int64_t c = 0; c < C; ++c) {
    T* seen = window + c * (W - 1);
    float sum = to_float(x[c]) * to_float(w[c * W + W - 1]);
    for (int64_t i = 0; i < W - 1; ++i) {
      sum += to_float(seen[i]) * to_float(w[c * W + i]);
      seen[i] = i + 1 < W - 1 ? seen[i + 1] : x[c];
    }
    sums[c] = sum;
  }
  each16(0, C, [&](int64_t c, auto lanes) {
    const __m512 sum = load(sums + c, lanes);
    store(y + c, _mm512_mul_ps(sum, sigmoid512(sum)), lanes);
  });
}

template <class T>
void run_conv(const Tensor& x, const Tensor& w, const Tensor& state, const Tensor& slots, const Tensor& y) {
  const int64_t C = w.size(0), W = w.size(1), part = 1024, parts = (C + part - 1) / part;
  at::parallel_for(0, x.size(0) * parts, 4, [&](int64_t from, int64_t to) {
    Scratch<float> sums;
    for (int64_t task = from; task < to; ++task) {
      const int64_t b = task / parts, c = task % parts * part, slot = slots.data_ptr<int64_t>()[b];
      convolve<T>(data<T>(x) + b * C + c, data<T>(w) + c * W,
                  static_cast<T*>(state.data_ptr()) + (slot * C + c) * (W - 1),
                  static_cast<T*>(y.data_ptr()) + b * C + c, sums.get(part), std::min(part, C - c), W);
    }
  });
}

Tensor conv_step(const Tensor& x_, const Tensor& w_, const Tensor& state, const Tensor& slots_) {
  check_float(x_, "x");
  TORCH_CHECK(x_.dim() == 2 && w_.dim() == 2 && state.dim() == 3, "not x_BC, w_CW and state_NCW");
  const int64_t B = x_.size(0), C = w_.size(0), W = w_.size(1);
  const auto type = x_.scalar_type();
  TORCH_CHECK(state.scalar_type() == type && state.is_contiguous() && state.size(1) == C &&
                  state.size(2) == W - 1,
              "state must be contiguous ", type, " [N, ", C, ", ", W - 1, "], not ", state.scalar_type(), " ",
              state.sizes());
  const Tensor x = dense(x_, type, {B, C}, "x"), w = dense(w_, type, {C, W}, "w");
  const Tensor slots = dense(slots_, at::kLong, {B}, "slots");
  check_slots(slots, state.size(0));
  Tensor y = at::empty({B, C}, x.options());
  if (type == at::kBFloat16)
    run_conv<bf16>(x, w, state, slots, y);
  else
    run_conv<float>(x, w, state, slots, y);
  return y;
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY_FRAGMENT(grpo_cpu, m) {
  m.def("delta_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor slots,"
        " float scale) -> Tensor", grpo::delta_step);
  m.def("conv_step(Tensor x, Tensor w, Tensor(a!) state, Tensor slots) -> Tensor", grpo::conv_step);
}

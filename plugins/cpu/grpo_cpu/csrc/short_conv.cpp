// short_conv.varlen, forward and backward. One task is 16 channels over all tokens: sums over tokens are taken
// in one order whatever the threads.
#include "short_conv.h"

#include "simd.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t LANES = 16;

// 16 channels (fewer at the end) of filter, state and gradient.
template <class T>
struct Channels {
  const Conv<T>& a;
  int64_t at;
  __mmask16 lanes;
  __m512 w[MOST_TAPS];

  Channels(const Conv<T>& conv, int64_t task)
      : a(conv), at(task * LANES), lanes(first(conv.channels - task * LANES)) {
    for (int64_t i = 0; i < a.taps; ++i) w[i] = gather(a.w + at * a.taps + i, a.taps);
  }
  // Values `stride` apart, one of each channel.
  __m512 gather(const T* p, int64_t stride) const {
    alignas(64) float x[LANES] = {};
    for (int64_t c = 0; c < LANES && at + c < a.channels; ++c) x[c] = to_float(p[c * stride]);
    return _mm512_load_ps(x);
  }
  void scatter(T* p, int64_t stride, __m512 value) const {
    alignas(64) T x[LANES];
    store(x, value);
    for (int64_t c = 0; c < LANES && at + c < a.channels; ++c) p[c * stride] = x[c];
  }
  // Input `t` of segment `s`; those before its start are the initial state or zeros.
  __m512 input(int64_t s, int64_t t) const {
    if (t >= 0) return load(a.x + (a.ends[s] + t) * a.x_row + at, lanes);
    if (!a.initial) return _mm512_setzero_ps();
    return gather(a.initial + (s * a.channels + at) * (a.taps - 1) + a.taps - 1 + t, a.taps - 1);
  }
};

template <int TAPS, class T>
void forward(const Channels<T>& c, int64_t s, T* y, int64_t taps) {
  const Conv<T>& a = c.a;
  const int64_t length = a.ends[s + 1] - a.ends[s], W = TAPS ? TAPS : taps;
  __m512 seen[MOST_TAPS];
  for (int64_t i = 0; i + 1 < W; ++i) seen[i] = c.input(s, i - W + 1);
  for (int64_t t = 0; t < length; ++t) {
    seen[W - 1] = c.input(s, t);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < W; ++i) sum = _mm512_fmadd_ps(c.w[i], seen[i], sum);
    store(y + (a.ends[s] + t) * a.channels + c.at, _mm512_mul_ps(sum, sigmoid512(sum)), c.lanes);
    for (int64_t i = 0; i + 1 < W; ++i) seen[i] = seen[i + 1];
  }
}

// Gradients of a segment's inputs, from its last token back; `sums` gathers that of the filter.
template <int TAPS, class T>
void backward(const Channels<T>& c, int64_t s, const T* dy, const T* dlast, T* dx, T* dinitial, __m512* sums,
              int64_t taps) {
  const Conv<T>& a = c.a;
  const int64_t length = a.ends[s + 1] - a.ends[s], W = TAPS ? TAPS : taps, past = W - 1;
  const __m512 one = _mm512_set1_ps(1.f);
  // seen[i]: input t - past + i; owed[i]: the gradient of input t - past + i so far.
  __m512 seen[MOST_TAPS], owed[MOST_TAPS];
  for (int64_t i = 0; i < past; ++i) {
    seen[i + 1] = c.input(s, length - past + i);
    owed[i + 1] = dlast ? c.gather(dlast + (s * a.channels + c.at) * past + i, past) : _mm512_setzero_ps();
  }
  for (int64_t t = length - 1; t >= 0; --t) {
    // seen and owed hold inputs t - past + 1 .. t at 1 .. past: one older comes in front.
    __m512 sum = _mm512_setzero_ps();
    seen[0] = c.input(s, t - past), owed[0] = _mm512_setzero_ps();
    if (past == 0) seen[0] = c.input(s, t);
    for (int64_t i = 0; i < W; ++i) sum = _mm512_fmadd_ps(c.w[i], seen[i], sum);
    const __m512 gate = sigmoid512(sum);
    const __m512 slope = _mm512_mul_ps(gate, _mm512_fmadd_ps(sum, _mm512_sub_ps(one, gate), one));
    const __m512 d = _mm512_mul_ps(slope, load(dy + (a.ends[s] + t) * a.channels + c.at, c.lanes));
    for (int64_t i = 0; i < W; ++i) {
      sums[i] = _mm512_fmadd_ps(d, seen[i], sums[i]);
      owed[i] = _mm512_fmadd_ps(d, c.w[i], owed[i]);
    }
    store(dx + (a.ends[s] + t) * a.channels + c.at, owed[W - 1], c.lanes);
    for (int64_t i = past; i > 0; --i) seen[i] = seen[i - 1], owed[i] = owed[i - 1];
  }
  for (int64_t i = 0; dinitial && i < past; ++i)
    c.scatter(dinitial + (s * a.channels + c.at) * past + i, past, owed[i + 1]);
}

}  // namespace

template <class T>
void conv_forward(const Conv<T>& a, T* y, T* last) {
  spread((a.channels + LANES - 1) / LANES, [&](int64_t task) {
    const Channels<T> c(a, task);
    const int64_t past = a.taps - 1;
    for (int64_t s = 0; s < a.segments; ++s) {
      a.taps == 4 ? forward<4>(c, s, y, 4) : forward<0>(c, s, y, a.taps);
      for (int64_t i = 0; last && i < past; ++i)
        c.scatter(last + (s * a.channels + c.at) * past + i, past,
                  c.input(s, a.ends[s + 1] - a.ends[s] - past + i));
    }
  });
}

template <class T>
void conv_backward(const Conv<T>& a, const T* dy, const T* dlast, T* dx, T* dw, T* dinitial) {
  spread((a.channels + LANES - 1) / LANES, [&](int64_t task) {
    const Channels<T> c(a, task);
    __m512 sums[MOST_TAPS];
    for (int64_t i = 0; i < a.taps; ++i) sums[i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < a.segments; ++s)
      a.taps == 4 ? backward<4>(c, s, dy, dlast, dx, dinitial, sums, 4)
                  : backward<0>(c, s, dy, dlast, dx, dinitial, sums, a.taps);
    for (int64_t i = 0; i < a.taps; ++i) c.scatter(dw + c.at * a.taps + i, a.taps, sums[i]);
  });
}

template void conv_forward(const Conv<bf16>&, bf16*, bf16*);
template void conv_forward(const Conv<float>&, float*, float*);
template void conv_backward(const Conv<bf16>&, const bf16*, const bf16*, bf16*, bf16*, bf16*);
template void conv_backward(const Conv<float>&, const float*, const float*, float*, float*, float*);

}  // namespace grpo

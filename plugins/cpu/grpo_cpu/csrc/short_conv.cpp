// short_conv.varlen, forward and backward. One task is some channels over all tokens: sums over tokens are
// taken in one order whatever the threads. Its groups of 16 channels take turns over blocks of tokens, because
// rows are long and a group alone would use a part of every cache line.
#include "short_conv.h"

#include <vector>

#include "simd.h"
#include "spread.h"

namespace grpo {
namespace {

constexpr int64_t LANES = 16;
constexpr int64_t GROUPS = 4;
constexpr int64_t BLOCK = 32;  // tokens

// 16 channels (fewer at the end) of filter, state and gradient.
template <class T>
struct Channels {
  const Conv<T>& a;
  int64_t at;
  __mmask16 lanes;
  __m512 w[MOST_TAPS], sums[MOST_TAPS];  // the filter and its gradient
  __m512 seen[MOST_TAPS], owed[MOST_TAPS];  // between blocks of a segment: inputs, and their gradients so far

  Channels(const Conv<T>& conv, int64_t group)
      : a(conv), at(group * LANES), lanes(first(conv.channels - group * LANES)) {
    for (int64_t i = 0; i < a.taps; ++i) w[i] = gather(a.w + at * a.taps + i, a.taps);
    for (int64_t i = 0; i < a.taps; ++i) sums[i] = _mm512_setzero_ps();
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

// Tokens from..to of a segment.
template <int TAPS, class T>
void forward(Channels<T>& c, int64_t s, int64_t from, int64_t to, T* y, int64_t taps) {
  const Conv<T>& a = c.a;
  const int64_t W = TAPS ? TAPS : taps;
  __m512 seen[MOST_TAPS], w[MOST_TAPS];
  for (int64_t i = 0; i < W; ++i) w[i] = c.w[i];
  for (int64_t i = 0; i + 1 < W; ++i) seen[i] = from ? c.seen[i] : c.input(s, i - W + 1);
  for (int64_t t = from; t < to; ++t) {
    seen[W - 1] = c.input(s, t);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < W; ++i) sum = _mm512_fmadd_ps(w[i], seen[i], sum);
    store(y + (a.ends[s] + t) * a.channels + c.at, _mm512_mul_ps(sum, sigmoid512(sum)), c.lanes);
    for (int64_t i = 0; i + 1 < W; ++i) seen[i] = seen[i + 1];
  }
  for (int64_t i = 0; i + 1 < W; ++i) c.seen[i] = seen[i];
}

// The gradients that reach a segment's last inputs from behind it.
template <class T>
void begin_backward(Channels<T>& c, int64_t s, const T* dlast) {
  const Conv<T>& a = c.a;
  const int64_t length = a.ends[s + 1] - a.ends[s], past = a.taps - 1;
  for (int64_t i = 0; i < past; ++i) {
    c.seen[i + 1] = c.input(s, length - past + i);
    c.owed[i + 1] = dlast ? c.gather(dlast + (s * a.channels + c.at) * past + i, past) : _mm512_setzero_ps();
  }
}

// Gradients of the inputs from..to of a segment, from the last back.
template <int TAPS, class T>
void backward(Channels<T>& c, int64_t s, int64_t from, int64_t to, const T* dy, T* dx, int64_t taps) {
  const Conv<T>& a = c.a;
  const int64_t W = TAPS ? TAPS : taps, past = W - 1;
  const __m512 one = _mm512_set1_ps(1.f);
  // seen[i]: input t - past + i; owed[i]: the gradient of input t - past + i so far.
  __m512 seen[MOST_TAPS], owed[MOST_TAPS], sums[MOST_TAPS], w[MOST_TAPS];
  for (int64_t i = 0; i < W; ++i) w[i] = c.w[i], sums[i] = c.sums[i];
  for (int64_t i = 1; i < W; ++i) seen[i] = c.seen[i], owed[i] = c.owed[i];
  for (int64_t t = to - 1; t >= from; --t) {
    // seen and owed hold inputs t - past + 1 .. t at 1 .. past: one older comes in front.
    __m512 sum = _mm512_setzero_ps();
    seen[0] = c.input(s, t - past), owed[0] = _mm512_setzero_ps();
    for (int64_t i = 0; i < W; ++i) sum = _mm512_fmadd_ps(w[i], seen[i], sum);
    const __m512 gate = sigmoid512(sum);
    const __m512 slope = _mm512_mul_ps(gate, _mm512_fmadd_ps(sum, _mm512_sub_ps(one, gate), one));
    const __m512 d = _mm512_mul_ps(slope, load(dy + (a.ends[s] + t) * a.channels + c.at, c.lanes));
    for (int64_t i = 0; i < W; ++i) {
      sums[i] = _mm512_fmadd_ps(d, seen[i], sums[i]);
      owed[i] = _mm512_fmadd_ps(d, w[i], owed[i]);
    }
    store(dx + (a.ends[s] + t) * a.channels + c.at, owed[W - 1], c.lanes);
    for (int64_t i = past; i > 0; --i) seen[i] = seen[i - 1], owed[i] = owed[i - 1];
  }
  for (int64_t i = 0; i < W; ++i) c.sums[i] = sums[i];
  for (int64_t i = 1; i < W; ++i) c.seen[i] = seen[i], c.owed[i] = owed[i];
}

// work(groups) for all channels, `groups` being those of one task.
template <class T, class Work>
void share_channels(const Conv<T>& a, const Work& work) {
  const int64_t groups = (a.channels + LANES - 1) / LANES;
  const int64_t each = groups >= 2 * GROUPS * at::get_num_threads() ? GROUPS : 1;
  spread((groups + each - 1) / each, [&](int64_t task) {
    std::vector<Channels<T>> mine;
    for (int64_t g = task * each; g < std::min(groups, (task + 1) * each); ++g) mine.emplace_back(a, g);
    work(mine);
  });
}

}  // namespace

template <class T>
void conv_forward(const Conv<T>& a, T* y, T* last) {
  share_channels(a, [&](std::vector<Channels<T>>& groups) {
    const int64_t past = a.taps - 1;
    for (int64_t s = 0; s < a.segments; ++s) {
      const int64_t length = a.ends[s + 1] - a.ends[s];
      for (int64_t from = 0; from < length; from += BLOCK)
        for (Channels<T>& c : groups) {
          const int64_t to = std::min(from + BLOCK, length);
          a.taps == 4 ? forward<4>(c, s, from, to, y, 4) : forward<0>(c, s, from, to, y, a.taps);
        }
      for (const Channels<T>& c : groups)
        for (int64_t i = 0; last && i < past; ++i)
          c.scatter(last + (s * a.channels + c.at) * past + i, past, c.input(s, length - past + i));
    }
  });
}

template <class T>
void conv_backward(const Conv<T>& a, const T* dy, const T* dlast, T* dx, T* dw, T* dinitial) {
  share_channels(a, [&](std::vector<Channels<T>>& groups) {
    const int64_t past = a.taps - 1;
    for (int64_t s = 0; s < a.segments; ++s) {
      for (Channels<T>& c : groups) begin_backward(c, s, dlast);
      for (int64_t to = a.ends[s + 1] - a.ends[s]; to > 0; to -= BLOCK)
        for (Channels<T>& c : groups) {
          const int64_t from = std::max<int64_t>(0, to - BLOCK);
          a.taps == 4 ? backward<4>(c, s, from, to, dy, dx, 4) : backward<0>(c, s, from, to, dy, dx, a.taps);
        }
      for (const Channels<T>& c : groups)
        for (int64_t i = 0; dinitial && i < past; ++i)
          c.scatter(dinitial + (s * a.channels + c.at) * past + i, past, c.owed[i + 1]);
    }
    for (const Channels<T>& c : groups)
      for (int64_t i = 0; i < a.taps; ++i) c.scatter(dw + c.at * a.taps + i, a.taps, c.sums[i]);
  });
}

template void conv_forward(const Conv<bf16>&, bf16*, bf16*);
template void conv_forward(const Conv<float>&, float*, float*);
template void conv_backward(const Conv<bf16>&, const bf16*, const bf16*, bf16*, bf16*, bf16*);
template void conv_backward(const Conv<float>&, const float*, const float*, float*, float*, float*);

}  // namespace grpo

// short_conv.varlen: a causal depthwise convolution over packed segments, then SiLU.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace grpo {

constexpr int64_t MOST_TAPS = 16;

template <class T>
struct Conv {
  const T* x;  // [tokens, channels]
  ptrdiff_t x_row;
  const T *w, *initial;  // [channels, taps]; [segments, channels, taps - 1], oldest first, or null
  const int32_t* ends;
  int64_t segments, channels, taps;
};
template <class T>
void conv_forward(const Conv<T>& a, T* y, T* last);  // last may be null
template <class T>
void conv_backward(const Conv<T>& a, const T* dy, const T* dlast, T* dx, T* dw, T* dinitial);

}  // namespace grpo

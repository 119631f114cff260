// Matrix products of float32 matrices whose rows are contiguous.
#pragma once
#include <cstddef>
#include <cstdint>

namespace grpo {

struct WideProduct {
  const float* a;  // [m, k]
  ptrdiff_t a_row;
  const float* b;  // [k, n], or [n, k] where `transposed`
  ptrdiff_t b_row;
  bool transposed;
  const float* packed;  // by `wide_pack` instead of b, or null
  const float* bias;  // [n] or null
  float* c;           // [m, n], contiguous
  int64_t m, n, k;
};
void wide_product(const WideProduct& p);
// B^T [n, k], row length `stride`, in panels: wide_packed_size(n, k) numbers.
int64_t wide_packed_size(int64_t n, int64_t k);
void wide_pack(const float* b, ptrdiff_t stride, int64_t n, int64_t k, float* out);

struct WideWeightGrad {
  const float *g, *x;  // [tokens, n], [tokens, k]
  ptrdiff_t g_row, x_row;
  float* c;  // [n, k], contiguous; added to
  int64_t tokens, n, k;
};
void wide_weight_grad(const WideWeightGrad& a);

}  // namespace grpo

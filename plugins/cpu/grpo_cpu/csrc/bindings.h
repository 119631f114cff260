// Shared by the files that hand torch tensors to the kernels.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "kernels.h"
#include "pool.h"

namespace grpo {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check_bf16(const Tensor& x, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_cpu(), name,
              " must be a bfloat16 tensor on the CPU, not ", x.scalar_type(), " on ", x.device());
}

inline bf16* bits(const Tensor& x) { return reinterpret_cast<bf16*>(x.data_ptr<at::BFloat16>()); }
inline bf16* bits(const MaybeTensor& x) { return x ? bits(*x) : nullptr; }

// The elements as T; the dtype was checked before.
template <class T>
T* data(const Tensor& x) {
  if constexpr (sizeof(T) == 2)
    return bits(x);
  else
    return x.data_ptr<T>();
}
template <class T>
T* data(const MaybeTensor& x) { return x ? data<T>(*x) : nullptr; }

// bfloat16 or float32 on the CPU, as `like` where that is given.
inline void check_float(const Tensor& x, const char* name, const Tensor* like = nullptr) {
  const bool known = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat;
  TORCH_CHECK(known && x.is_cpu() && (!like || like->scalar_type() == x.scalar_type()), name,
              " must be a tensor of ", like ? c10::toString(like->scalar_type()) : "bfloat16 or float32",
              " on the CPU, not ", x.scalar_type(), " on ", x.device());
}

// work(T{}) with the element type of x.
template <class Work>
auto by_dtype(const Tensor& x, const Work& work) {
  return x.scalar_type() == at::kFloat ? work(float{}) : work(bf16{});
}

inline Tensor dense(const Tensor& x, at::ScalarType dtype, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.sizes() == shape, name, " has shape ", x.sizes(), ", wanted ", shape);
  return x.to(at::kCPU, dtype).contiguous();
}

inline Tensor dense_bf16(const Tensor& x, const char* name) {
  check_bf16(x, name);
  return x.contiguous();
}

inline Tensor dense_float(const Tensor& x, const char* name, const Tensor* like = nullptr) {
  check_float(x, name, like);
  return x.contiguous();
}

// Heads of tokens [T, heads, d] with d innermost; other strides as they come.
inline Tensor heads(const Tensor& x, const char* name, const Tensor* like = nullptr) {
  check_float(x, name, like);
  TORCH_CHECK(x.dim() == 3, name, " has ", x.dim(), " dimensions, wanted 3");
  return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous();
}

inline void check_head_dim(int64_t d, const char* name) {
  TORCH_CHECK(d > 0 && d % 32 == 0 && d <= 256, name, " is ", d, ", wanted a multiple of 32 up to 256");
}

}  // namespace grpo

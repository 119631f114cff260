// torch.ops.grpo_cpu: matrix products of linear layers in float32.
#include "bindings.h"
#include "wide_product.h"

namespace grpo {
namespace {

Tensor rows_of(const Tensor& x, const char* name) {
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kFloat && x.dim() == 2, name,
              " must be a float32 matrix on the CPU, not ", x.scalar_type(), " ", x.sizes());
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
}

const float* numbers(const Tensor& x) { return x.const_data_ptr<float>(); }

// x [T, K] w^T + b -> [T, N]
Tensor wide_linear(const Tensor& x_, const Tensor& w_, const MaybeTensor& bias_) {
  const Tensor x = rows_of(x_, "x"), w = rows_of(w_, "w");
  TORCH_CHECK(x.size(1) == w.size(1), "x has shape ", x.sizes(), ", w ", w.sizes());
  MaybeTensor bias;
  if (bias_) bias = dense(*bias_, at::kFloat, {w.size(0)}, "bias");
  Tensor y = at::empty({x.size(0), w.size(0)}, x.options());
  wide_product({numbers(x), x.stride(0), numbers(w), w.stride(0), true, bias ? numbers(*bias) : nullptr,
                y.data_ptr<float>(), x.size(0), w.size(0), x.size(1)});
  return y;
}

// g [T, N] w -> [T, K]
Tensor wide_input_grad(const Tensor& g_, const Tensor& w_) {
  const Tensor g = rows_of(g_, "g"), w = rows_of(w_, "w");
  TORCH_CHECK(g.size(1) == w.size(0), "g has shape ", g.sizes(), ", w ", w.sizes());
  Tensor x = at::empty({g.size(0), w.size(1)}, g.options());
  wide_product({numbers(g), g.stride(0), numbers(w), w.stride(0), false, nullptr, x.data_ptr<float>(),
                g.size(0), w.size(1), g.size(1)});
  return x;
}

// total [N, K] += g [T, N]^T x [T, K]
void wide_add_weight_grad(const Tensor& g_, const Tensor& x_, Tensor total) {
  const Tensor g = rows_of(g_, "g"), x = rows_of(x_, "x");
  TORCH_CHECK(g.size(0) == x.size(0) && total.scalar_type() == at::kFloat && total.is_contiguous() &&
                  total.dim() == 2 && total.size(0) == g.size(1) && total.size(1) == x.size(1),
              "g has shape ", g.sizes(), ", x ", x.sizes(), ", total ", total.sizes());
  wide_weight_grad({numbers(g), numbers(x), g.stride(0), x.stride(0), total.data_ptr<float>(), x.size(0),
                    g.size(1), x.size(1)});
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY_FRAGMENT(grpo_cpu, m) {
  m.def("wide_linear(Tensor x, Tensor w, Tensor? bias) -> Tensor", grpo::wide_linear);
  m.def("wide_input_grad(Tensor g, Tensor w) -> Tensor", grpo::wide_input_grad);
  m.def("wide_add_weight_grad(Tensor g, Tensor x, Tensor(a!) total) -> ()", grpo::wide_add_weight_grad);
}

// torch.ops.grpo_cpu: matrix products of linear layers in float32.
#include "bindings.h"
#include "pool.h"
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
  Tensor y = room({x.size(0), w.size(0)}, x);
  wide_product({numbers(x), x.stride(0), numbers(w), w.stride(0), true, nullptr,
                bias ? numbers(*bias) : nullptr, y.data_ptr<float>(), x.size(0), w.size(0), x.size(1)});
  return y;
}

// x [T, K] w^T into `y`, whose rows are contiguous.
void wide_linear_out(const Tensor& x_, const Tensor& w_, Tensor y) {
  const Tensor x = rows_of(x_, "x"), w = rows_of(w_, "w");
  TORCH_CHECK(x.size(1) == w.size(1) && y.is_contiguous() && y.dim() == 2 && y.size(0) == x.size(0) &&
                  y.size(1) == w.size(0) && y.scalar_type() == at::kFloat,
              "x has shape ", x.sizes(), ", w ", w.sizes(), ", y ", y.sizes());
  wide_product({numbers(x), x.stride(0), numbers(w), w.stride(0), true, nullptr, nullptr, y.data_ptr<float>(),
                x.size(0), w.size(0), x.size(1)});
}

int64_t wide_packed_numel(int64_t n, int64_t k) { return wide_packed_size(n, k); }

// w [N, K] in panels, into `packed`.
void wide_pack_linear(const Tensor& w_, Tensor packed) {
  const Tensor w = rows_of(w_, "w");
  TORCH_CHECK(packed.scalar_type() == at::kFloat && packed.is_contiguous() &&
                  packed.numel() == wide_packed_size(w.size(0), w.size(1)),
              "packed has ", packed.numel(), " elements, wanted ", wide_packed_size(w.size(0), w.size(1)));
  wide_pack(numbers(w), w.stride(0), w.size(0), w.size(1), packed.data_ptr<float>());
}

Tensor wide_linear_packed(const Tensor& x_, const Tensor& packed, const MaybeTensor& bias_, int64_t n) {
  const Tensor x = rows_of(x_, "x");
  TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == at::kFloat &&
                  packed.numel() == wide_packed_size(n, x.size(1)),
              "x has shape ", x.sizes(), ", packed ", packed.sizes(), " for ", n, " rows");
  MaybeTensor bias;
  if (bias_) bias = dense(*bias_, at::kFloat, {n}, "bias");
  Tensor y = room({x.size(0), n}, x);
  wide_product({numbers(x), x.stride(0), nullptr, 0, true, numbers(packed), bias ? numbers(*bias) : nullptr,
                y.data_ptr<float>(), x.size(0), n, x.size(1)});
  return y;
}

// g [T, N] w -> [T, K]
Tensor wide_input_grad(const Tensor& g_, const Tensor& w_) {
  const Tensor g = rows_of(g_, "g"), w = rows_of(w_, "w");
  TORCH_CHECK(g.size(1) == w.size(0), "g has shape ", g.sizes(), ", w ", w.sizes());
  Tensor x = room({g.size(0), w.size(1)}, g);
  wide_product({numbers(g), g.stride(0), numbers(w), w.stride(0), false, nullptr, nullptr,
                x.data_ptr<float>(), g.size(0), w.size(1), g.size(1)});
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
  m.def("wide_linear_out(Tensor x, Tensor w, Tensor(a!) y) -> ()", grpo::wide_linear_out);
  m.def("wide_packed_numel(int n, int k) -> int", grpo::wide_packed_numel);
  m.def("wide_pack_linear(Tensor w, Tensor(a!) packed) -> ()", grpo::wide_pack_linear);
  m.def("wide_linear_packed(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor",
        grpo::wide_linear_packed);
  m.def("wide_input_grad(Tensor g, Tensor w) -> Tensor", grpo::wide_input_grad);
  m.def("wide_add_weight_grad(Tensor g, Tensor x, Tensor(a!) total) -> ()", grpo::wide_add_weight_grad);
}

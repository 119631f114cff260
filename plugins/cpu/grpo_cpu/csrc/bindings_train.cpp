// torch.ops.grpo_cpu: matrix products of linear layers, and their weights' gradients.
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/linear.h>

#include "bindings.h"

namespace grpo {
namespace {

Tensor rows_of(const Tensor& x, const char* name) {
  check_bf16(x, name);
  TORCH_CHECK(x.dim() == 2, name, " has ", x.dim(), " dimensions, wanted 2");
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
}

void add_weight_grad(const Tensor& g_, const Tensor& x_, Tensor total) {
  const Tensor g = rows_of(g_, "g"), x = rows_of(x_, "x");
  TORCH_CHECK(g.size(0) == x.size(0), "g has ", g.size(0), " rows, x ", x.size(0));
  TORCH_CHECK(total.scalar_type() == at::kFloat && total.is_contiguous() && total.dim() == 2 &&
                  total.size(0) == g.size(1) && total.size(1) == x.size(1),
              "total has shape ", total.sizes(), ", wanted contiguous float32 [", g.size(1), ", ", x.size(1),
              "]");
  weight_grad<float>({bits(g), bits(x), g.stride(0), x.stride(0), total.data_ptr<float>(), x.size(0), g.size(1),
                      x.size(1)});
}

// g [T, N]^T x [T, K], summed in float32 and rounded once
Tensor new_weight_grad(const Tensor& g_, const Tensor& x_) {
  const Tensor g = rows_of(g_, "g"), x = rows_of(x_, "x");
  TORCH_CHECK(g.size(0) == x.size(0), "g has ", g.size(0), " rows, x ", x.size(0));
  Tensor c = room({g.size(1), x.size(1)}, g);
  weight_grad<bf16>({bits(g), bits(x), g.stride(0), x.stride(0), bits(c), x.size(0), g.size(1), x.size(1)});
  return c;
}

// The sum of the rows of g [T, N], in float32 and rounded once
Tensor bias_grad(const Tensor& g_) {
  check_float(g_, "g");
  TORCH_CHECK(g_.dim() == 2, "g has ", g_.dim(), " dimensions, wanted 2");
  const Tensor g = g_.stride(1) == 1 || g_.size(1) == 1 ? g_ : g_.contiguous();
  Tensor sum = at::empty({g.size(1)}, g.options().dtype(at::kFloat));
  by_dtype(g, [&](auto kind) {
    row_sum(data<decltype(kind)>(g), g.stride(0), g.size(0), g.size(1), sum.data_ptr<float>());
  });
  return sum.to(g.scalar_type());
}

MaybeTensor bias_of(const MaybeTensor& bias, int64_t n) {
  if (!bias) return bias;
  check_bf16(*bias, "bias");
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, "bias has shape ", bias->sizes(), ", wanted [", n, "]");
  return bias->contiguous();
}

// Pairs are read as 32 bits: an odd width goes to torch, or gets a column of zeros.
bool even(const Tensor& a) { return a.size(1) % 2 == 0; }

// x [T, K] w^T + b -> [T, N]
Tensor linear(const Tensor& x_, const Tensor& w_, const MaybeTensor& bias_) {
  const Tensor x = rows_of(x_, "x"), w = rows_of(w_, "w");
  TORCH_CHECK(x.size(1) == w.size(1), "x has shape ", x.sizes(), ", w ", w.sizes());
  if (!even(x)) return at::linear(x, w, bias_);
  const MaybeTensor bias = bias_of(bias_, w.size(0));
  Tensor y = room({x.size(0), w.size(0)}, x);
  product({bits(x), x.stride(0), bits(w), w.stride(0), true, nullptr, bits(bias), bits(y), w.size(0),
           x.size(0), w.size(0), x.size(1)});
  return y;
}

// The same into `y`, whose rows are contiguous.
void linear_out(const Tensor& x_, const Tensor& w_, Tensor y) {
  const Tensor x = rows_of(x_, "x"), w = rows_of(w_, "w");
  TORCH_CHECK(x.size(1) == w.size(1) && y.is_contiguous() && y.dim() == 2 && y.size(0) == x.size(0) &&
                  y.size(1) == w.size(0) && y.scalar_type() == at::kBFloat16,
              "x has shape ", x.sizes(), ", w ", w.sizes(), ", y ", y.sizes());
  if (!even(x)) {
    y.copy_(at::linear(x, w));
    return;
  }
  product({bits(x), x.stride(0), bits(w), w.stride(0), true, nullptr, nullptr, bits(y), w.size(0), x.size(0),
           w.size(0), x.size(1)});
}

// g [T, N] w -> [T, K]
Tensor linear_input_grad(const Tensor& g_, const Tensor& w_) {
  const Tensor g = rows_of(g_, "g"), w = rows_of(w_, "w");
  TORCH_CHECK(g.size(1) == w.size(0), "g has shape ", g.sizes(), ", w ", w.sizes());
  if (!even(g)) return linear_input_grad(at::constant_pad_nd(g, {0, 1}), at::constant_pad_nd(w, {0, 0, 0, 1}));
  Tensor x = room({g.size(0), w.size(1)}, g);
  product({bits(g), g.stride(0), bits(w), w.stride(0), false, nullptr, nullptr, bits(x), w.size(1), g.size(0),
           w.size(1), g.size(1)});
  return x;
}

// w [N, K] in panels, into `packed`, which has room for packed_size(N, K).
void pack_linear(const Tensor& w_, Tensor packed) {
  const Tensor w = rows_of(w_, "w");
  TORCH_CHECK(even(w), "w has an odd width of ", w.size(1));
  TORCH_CHECK(packed.scalar_type() == at::kBFloat16 && packed.is_contiguous() &&
                  packed.numel() == packed_size(w.size(0), w.size(1)),
              "packed has ", packed.numel(), " elements, wanted ", packed_size(w.size(0), w.size(1)));
  pack({nullptr, 0, bits(w), w.stride(0), true, nullptr, nullptr, nullptr, 0, 0, w.size(0), w.size(1)},
       bits(packed));
}

Tensor empty_rows(const Tensor& like, int64_t rows, int64_t columns) { return room({rows, columns}, like); }

int64_t packed_numel(int64_t n, int64_t k) { return packed_size(n, k); }

Tensor linear_packed(const Tensor& x_, const Tensor& packed, const MaybeTensor& bias_, int64_t n) {
  const Tensor x = rows_of(x_, "x");
  TORCH_CHECK(even(x) && packed.is_contiguous() && packed.scalar_type() == at::kBFloat16 &&
                  packed.numel() == packed_size(n, x.size(1)),
              "x has shape ", x.sizes(), ", packed ", packed.sizes(), " for ", n, " rows");
  const MaybeTensor bias = bias_of(bias_, n);
  Tensor y = room({x.size(0), n}, x);
  product({bits(x), x.stride(0), nullptr, 0, true, bits(packed), bits(bias), bits(y), n, x.size(0), n,
           x.size(1)});
  return y;
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY_FRAGMENT(grpo_cpu, m) {
  m.def("add_weight_grad(Tensor g, Tensor x, Tensor(a!) total) -> ()", grpo::add_weight_grad);
  m.def("weight_grad(Tensor g, Tensor x) -> Tensor", grpo::new_weight_grad);
  m.def("bias_grad(Tensor g) -> Tensor", grpo::bias_grad);
  m.def("empty_rows(Tensor like, int rows, int columns) -> Tensor", grpo::empty_rows);
  m.def("release_room(int at_least=0) -> int", grpo::release_room);
  m.def("linear(Tensor x, Tensor w, Tensor? bias) -> Tensor", grpo::linear);
  m.def("linear_out(Tensor x, Tensor w, Tensor(a!) y) -> ()", grpo::linear_out);
  m.def("linear_input_grad(Tensor g, Tensor w) -> Tensor", grpo::linear_input_grad);
  m.def("packed_numel(int n, int k) -> int", grpo::packed_numel);
  m.def("pack_linear(Tensor w, Tensor(a!) packed) -> ()", grpo::pack_linear);
  m.def("linear_packed(Tensor x, Tensor packed, Tensor? bias, int n) -> Tensor", grpo::linear_packed);
}

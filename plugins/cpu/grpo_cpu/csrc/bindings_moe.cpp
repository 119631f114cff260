// torch.ops.grpo_cpu: the parts of a mixture of experts.
#include <type_traits>

#include "bindings.h"
#include "moe.h"
#include "pool.h"

namespace grpo {
namespace {

// Calls body with a value of the type that the kernels know the dtype by.
template <class Body>
void typed(const Tensor& x, const Body& body) {
  TORCH_CHECK(x.is_cpu() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat),
              "rows must be bfloat16 or float32 on the CPU, not ", x.scalar_type(), " on ", x.device());
  if (x.scalar_type() == at::kBFloat16)
    body(bf16{});
  else
    body(float{});
}

template <class T>
T* data(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }
template <class T>
T* data(const MaybeTensor& x) { return x ? data<T>(*x) : nullptr; }

Tensor like_rows(const Tensor& x, const Tensor& rows, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == rows.scalar_type(), name, " is ", x.scalar_type(), " beside rows of ",
              rows.scalar_type());
  TORCH_CHECK(x.sizes() == shape, name, " has shape ", x.sizes(), ", wanted ", shape);
  return x.contiguous();
}

struct Held {
  Tensor rows, gate_up, down, counts;
  int64_t experts, c, f;
  template <class T>
  Experts<T> view() const {
    return {data<T>(rows), data<T>(gate_up), data<T>(down), counts.data_ptr<int64_t>(), experts, c, f};
  }
};

Held hold(const Tensor& rows, const Tensor& gate_up, const Tensor& down, const Tensor& counts) {
  TORCH_CHECK(rows.dim() == 2 && down.dim() == 3, "rows must be [R, C] and down [X, C, F]");
  const int64_t x = down.size(0), c = down.size(1), f = down.size(2);
  Held h{like_rows(rows, rows, {rows.size(0), c}, "rows"), like_rows(gate_up, rows, {x, 2 * f, c}, "gate_up"),
         like_rows(down, rows, {x, c, f}, "down"), dense(counts, at::kLong, {x}, "counts"), x, c, f};
  TORCH_CHECK(rows.scalar_type() == at::kFloat || (c % 2 == 0 && f % 2 == 0), "odd sizes ", c, " and ", f);
  int64_t total = 0, least = 0;
  for (int64_t i = 0; i < x; ++i) {
    total += h.counts.data_ptr<int64_t>()[i];
    least = std::min(least, h.counts.data_ptr<int64_t>()[i]);
  }
  TORCH_CHECK_VALUE(total == rows.size(0) && least == 0, rows.size(0), " rows against counts of ", total,
                    " in all, ", least, " or more each");
  return h;
}

// Returns y and what went into SwiGLU (empty unless `keep`).
std::tuple<Tensor, Tensor> experts(const Tensor& rows, const Tensor& gate_up, const Tensor& down,
                                   const Tensor& counts, bool keep) {
  const Held h = hold(rows, gate_up, down, counts);
  const int64_t count = rows.size(0);
  Tensor y = room({count, h.c}, rows);
  Tensor kept = room({keep ? count : 0, 2 * h.f}, rows);
  const Tensor hidden = room({count, h.f}, rows);
  typed(rows, [&](auto zero) {
    using T = decltype(zero);
    experts_forward(h.view<T>(), keep ? data<T>(kept) : nullptr, data<T>(hidden), data<T>(y));
  });
  return {y, kept};
}

float* main_grad(const MaybeTensor& x, const Tensor& weight, const char* name) {
  if (!x) return nullptr;
  TORCH_CHECK(x->scalar_type() == at::kFloat && x->is_contiguous() && x->sizes() == weight.sizes(), name,
              " must be contiguous float32 of shape ", weight.sizes(), ", not ", x->scalar_type(), " ",
              x->sizes());
  return x->data_ptr<float>();
}

// A gradient that is added to main_gate_up or main_down is not returned.
std::tuple<MaybeTensor, MaybeTensor, MaybeTensor> experts_grad(
    const Tensor& rows, const Tensor& gate_up, const Tensor& down, const Tensor& counts, const Tensor& kept_,
    const Tensor& dy_, bool want_rows, bool want_gate_up, bool want_down, const MaybeTensor& main_gate_up,
    const MaybeTensor& main_down) {
  const Held h = hold(rows, gate_up, down, counts);
  const int64_t count = rows.size(0);
  const Tensor kept = like_rows(kept_, rows, {count, 2 * h.f}, "kept");
  const Tensor dy = like_rows(dy_, rows, {count, h.c}, "dy");
  MaybeTensor drows, dgate_up, ddown;
  if (want_rows) drows = room(h.rows.sizes(), h.rows);
  if (want_gate_up && !main_gate_up) dgate_up = room(h.gate_up.sizes(), h.gate_up);
  if (want_down && !main_down) ddown = room(h.down.sizes(), h.down);
  float* wide_gate_up = want_gate_up ? main_grad(main_gate_up, h.gate_up, "main_gate_up") : nullptr;
  float* wide_down = want_down ? main_grad(main_down, h.down, "main_down") : nullptr;
  const Tensor d_hidden = room(kept.sizes(), kept), hidden = room({count, h.f}, rows);
  typed(rows, [&](auto zero) {
    using T = decltype(zero);
    const ExpertsGrad<T> g{data<T>(kept),     data<T>(dy),    data<T>(drows), data<T>(dgate_up),
                           data<T>(ddown), wide_gate_up, wide_down};
    experts_backward(h.view<T>(), g, data<T>(d_hidden), data<T>(hidden));
  });
  return {drows, dgate_up, ddown};
}

std::tuple<Tensor, Tensor> routed(const Tensor& logits_, int64_t k, bool sigmoid, const MaybeTensor& bias_,
                                  int64_t groups, int64_t kept_groups, bool norm, double scale,
                                  const MaybeTensor& fixed_) {
  TORCH_CHECK(logits_.dim() == 2, "logits must be [T, X], not ", logits_.sizes());
  const int64_t tokens = logits_.size(0), experts = logits_.size(1);
  TORCH_CHECK_VALUE(groups >= 1 && experts % groups == 0 && kept_groups >= 1 && kept_groups <= groups && k >= 1
                        && k <= kept_groups * (experts / groups),
                    k, " experts of ", experts, " in ", kept_groups, " of ", groups, " groups make no sense");
  const Tensor logits = dense(logits_, at::kFloat, {tokens, experts}, "logits");
  MaybeTensor bias, fixed;
  if (bias_) bias = dense(*bias_, at::kFloat, {experts}, "bias");
  if (fixed_) {
    TORCH_CHECK_VALUE(fixed_->sizes() == at::IntArrayRef({tokens, k}), "fixed ids of shape ", fixed_->sizes());
    fixed = fixed_->to(at::kLong).contiguous();
  }
  Tensor weights = at::empty({tokens, k}, logits.options());
  Tensor ids = at::empty({tokens, k}, logits.options().dtype(at::kLong));
  const bool sound = route({logits.data_ptr<float>(), data<float>(bias), data<int64_t>(fixed), tokens, experts,
                            k, groups, kept_groups, sigmoid, norm, (float)scale},
                           weights.data_ptr<float>(), ids.data_ptr<int64_t>());
  TORCH_CHECK_VALUE(sound, "a row of fixed ids holds neither -1 alone nor ids of ", experts, " experts alone");
  return {weights, ids};
}

std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& ids_, int64_t experts) {
  const Tensor ids = dense(ids_, at::kLong, ids_.sizes(), "ids");
  Tensor order = at::empty({ids.numel()}, ids.options()), places = at::empty_like(order);
  Tensor counts = at::empty({experts}, ids.options());
  const bool sound = sort_pairs(ids.data_ptr<int64_t>(), ids.numel(), experts, order.data_ptr<int64_t>(),
                                places.data_ptr<int64_t>(), counts.data_ptr<int64_t>());
  TORCH_CHECK_VALUE(sound, "an id is not that of one of ", experts, " experts");
  return {order, places, counts};
}

// places holds [tokens * k]; without weights the rows of a token are added up.
Tensor combine(const Tensor& rows_, const MaybeTensor& weights_, const Tensor& places, int64_t tokens) {
  const Tensor rows = rows_.contiguous();
  const int64_t c = rows.size(1), k = tokens ? places.numel() / tokens : 0;
  TORCH_CHECK(places.is_contiguous() && rows.size(0) == places.numel() && places.numel() == tokens * k,
              rows.size(0), " rows for ", tokens, " tokens and ", places.numel(), " places");
  MaybeTensor weights;
  if (weights_) {
    TORCH_CHECK(weights_->numel() == places.numel(), "weights have shape ", weights_->sizes());
    weights = weights_->to(at::kFloat).contiguous();
  }
  Tensor y = room({tokens, c}, rows);
  typed(rows, [&](auto zero) {
    using T = decltype(zero);
    if (y.numel())
      sum_pairs(data<T>(rows), data<float>(weights), places.data_ptr<int64_t>(), tokens, k, c, data<T>(y));
  });
  return y;
}

std::tuple<MaybeTensor, MaybeTensor> combine_grad(const Tensor& rows_, const Tensor& weights_,
                                                  const Tensor& places, const Tensor& dy_, bool want_rows,
                                                  bool want_weights) {
  const Tensor rows = rows_.contiguous(), weights = weights_.to(at::kFloat).contiguous();
  const int64_t tokens = weights.size(0), k = weights.size(1), c = rows.size(1);
  const Tensor dy = like_rows(dy_, rows, {tokens, c}, "dy");
  TORCH_CHECK(places.is_contiguous() && rows.size(0) == places.numel() && places.numel() == tokens * k,
              rows.size(0), " rows for ", tokens, " tokens and ", places.numel(), " places");
  MaybeTensor drows, dweights;
  if (want_rows) drows = room(rows.sizes(), rows);
  if (want_weights) dweights = at::empty_like(weights);
  typed(rows, [&](auto zero) {
    using T = decltype(zero);
    if (rows.numel())
      sum_pairs_backward(data<T>(rows), data<float>(weights), places.data_ptr<int64_t>(), data<T>(dy),
                         tokens, k, c, data<T>(drows), data<float>(dweights));
  });
  return {drows, dweights};
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY_FRAGMENT(grpo_cpu, m) {
  m.def("moe_experts(Tensor rows, Tensor gate_up, Tensor down, Tensor counts, bool keep) -> (Tensor, Tensor)",
        grpo::experts);
  m.def("moe_experts_backward(Tensor rows, Tensor gate_up, Tensor down, Tensor counts, Tensor kept,"
        " Tensor dy, bool want_rows, bool want_gate_up, bool want_down, Tensor(a!)? main_gate_up=None,"
        " Tensor(b!)? main_down=None) -> (Tensor?, Tensor?, Tensor?)",
        grpo::experts_grad);
  m.def("moe_route(Tensor logits, int top_k, bool sigmoid, Tensor? bias, int num_groups, int topk_groups,"
        " bool norm, float scale, Tensor? ids) -> (Tensor, Tensor)", grpo::routed);
  m.def("moe_sort(Tensor ids, int experts) -> (Tensor, Tensor, Tensor)", grpo::sort);
  m.def("moe_combine(Tensor rows, Tensor? weights, Tensor places, int tokens) -> Tensor", grpo::combine);
  m.def("moe_combine_backward(Tensor rows, Tensor weights, Tensor places, Tensor dy, bool want_rows,"
        " bool want_weights) -> (Tensor?, Tensor?)", grpo::combine_grad);
}

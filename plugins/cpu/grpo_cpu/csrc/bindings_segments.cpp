// torch.ops.grpo_cpu: packed training attention.
#include <ATen/Parallel.h>

#include <cstring>

#include "bindings.h"

namespace grpo {
namespace {

template <class T>
Strided<T> strided(const Tensor& x) { return {data<T>(x), x.stride(0), x.stride(1)}; }

void check_segments(const Tensor& ends, const Tensor& parents, int64_t tokens) {
  const int32_t* at = ends.data_ptr<int32_t>();
  const int64_t count = ends.numel() - 1;
  bool rising = count >= 0 && at[0] == 0 && at[count] == tokens;
  for (int64_t s = 0; rising && s < count; ++s) rising = at[s] <= at[s + 1];
  TORCH_CHECK_VALUE(rising, "cu_seqlens must rise from 0 to the ", tokens, " tokens given");
  if (!parents.defined()) return;
  const int32_t* tree = parents.data_ptr<int32_t>();
  for (int64_t s = 0; s < count; ++s)
    TORCH_CHECK_VALUE(tree[s] >= -1 && tree[s] < s && (tree[s] < 0 || tree[tree[s]] < 0), "segment ", s,
                      " names ", tree[s], " as its parent: must be an earlier one without a parent");
}

struct Inputs {
  Tensor q, k, v, ends, parents;
  double scale;
  bool causal;
  int64_t window;
};

template <class T>
Segments<T> segments(const Inputs& x) {
  return {strided<T>(x.q), strided<T>(x.k), strided<T>(x.v), x.ends.data_ptr<int32_t>(),
          x.parents.defined() ? x.parents.data_ptr<int32_t>() : nullptr, x.ends.numel() - 1, x.q.size(1),
          x.k.size(1), x.q.size(2), x.v.size(2), x.window, (float)x.scale, x.causal};
}

Inputs inputs(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& ends_,
              const MaybeTensor& parents_, double scale, bool causal, int64_t window) {
  Inputs x{heads(q_, "q"), heads(k_, "k", &q_), heads(v_, "v", &q_), ends_.to(at::kInt).contiguous(), {}, scale,
           causal, window};
  TORCH_CHECK_VALUE(ends_.dim() == 1 && ends_.numel() > 0, "cu_seqlens has shape ", ends_.sizes());
  const int64_t tokens = x.q.size(0), count = x.ends.numel() - 1;
  if (parents_) x.parents = dense(*parents_, at::kInt, {count}, "parents");
  TORCH_CHECK_VALUE(x.k.size(0) == tokens && x.v.size(0) == tokens && x.k.size(1) == x.v.size(1) &&
                        x.q.size(2) == x.k.size(2) && x.k.size(1) > 0 && x.q.size(1) % x.k.size(1) == 0,
                    "q ", x.q.sizes(), ", k ", x.k.sizes(), " and v ", x.v.sizes(), " do not fit together");
  check_head_dim(x.q.size(2), "head_dim");
  check_head_dim(x.v.size(2), "v_head_dim");
  check_segments(x.ends, x.parents, tokens);
  return x;
}

// x [T, heads, d] without the gaps between its tokens: itself where there are none.
Tensor compact(const Tensor& x) {
  check_float(x, "x");
  if (x.dim() != 3 || x.is_contiguous() || x.stride(2) != 1 || x.stride(1) != x.size(2)) return x.contiguous();
  Tensor y = room(x.sizes(), x);
  const size_t row = x.size(1) * x.size(2) * x.element_size(), gap = x.stride(0) * x.element_size();
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(y.data_ptr());
  at::parallel_for(0, x.size(0), 256, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) std::memcpy(to + t * row, from + t * gap, row);
  });
  return y;
}

// Returns o and, where `keep`, the log of the sum of exponentials [heads, tokens] for the backward pass.
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ends,
                                   const MaybeTensor& parents, double scale, bool causal, int64_t window,
                                   bool keep) {
  const Inputs x = inputs(q, k, v, ends, parents, scale, causal, window);
  Tensor o = room({x.q.size(0), x.q.size(1), x.v.size(2)}, x.q);
  Tensor lse = at::empty({x.q.size(1), keep ? x.q.size(0) : 0}, x.q.options().dtype(at::kFloat));
  by_dtype(x.q, [&](auto kind) {
    using T = decltype(kind);
    segments_forward(segments<T>(x), data<T>(o), keep ? lse.data_ptr<float>() : nullptr);
  });
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& o, const Tensor& lse, const Tensor& grad_,
                                            const Tensor& ends,
                                            const MaybeTensor& parents, double scale, bool causal,
                                            int64_t window) {
  const Inputs x = inputs(q, k, v, ends, parents, scale, causal, window);
  const Tensor grad = heads(grad_, "grad", &q);
  TORCH_CHECK(grad.sizes() == o.sizes() && o.is_contiguous() && lse.is_contiguous(), "grad has shape ",
              grad.sizes());
  Tensor dq = room(x.q.sizes(), x.q), dk = room(x.k.sizes(), x.k);
  Tensor dv = room(x.v.sizes(), x.v);
  by_dtype(x.q, [&](auto kind) {
    using T = decltype(kind);
    segments_backward(segments<T>(x), data<T>(o), lse.data_ptr<float>(), strided<T>(grad), data<T>(dq),
                      data<T>(dk), data<T>(dv));
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY_FRAGMENT(grpo_cpu, m) {
  m.def("compact(Tensor x) -> Tensor", grpo::compact);
  m.def("segments(Tensor q, Tensor k, Tensor v, Tensor ends, Tensor? parents, float scale, bool causal,"
        " int window, bool keep) -> (Tensor, Tensor)", grpo::forward);
  m.def("segments_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor grad, Tensor ends,"
        " Tensor? parents, float scale, bool causal, int window) -> (Tensor, Tensor, Tensor)",
        grpo::backward);
}

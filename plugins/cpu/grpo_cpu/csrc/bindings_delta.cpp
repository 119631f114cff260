// gated_delta.chunk and short_conv.varlen as torch ops.
#include "bindings.h"
#include "delta.h"
#include "pool.h"
#include "short_conv.h"

namespace grpo {
namespace {

Tensor ends_of(const Tensor& cu_seqlens, int64_t tokens) {
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0, "cu_seqlens is not a list of ends");
  Tensor ends = cu_seqlens.to(at::kCPU, at::kInt).contiguous();
  const int32_t* at = ends.const_data_ptr<int32_t>();
  bool sound = at[0] == 0 && at[ends.numel() - 1] == tokens;
  for (int64_t s = 0; s + 1 < ends.numel(); ++s) sound = sound && at[s] <= at[s + 1];
  TORCH_CHECK_VALUE(sound, "cu_seqlens must rise from 0 to the number of tokens, ", tokens);
  return ends;
}

template <class T>
DeltaHeads<T> rows_of(const Tensor& x) { return {data<T>(x), x.stride(0), x.stride(1)}; }

// Tensors that a call reads, held while it runs.
struct DeltaInput {
  Tensor q, k, v, g, beta, ends;
  int64_t T, H, D, K, E;

  DeltaInput(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& g_, const Tensor& beta_,
             const Tensor& cu_seqlens)
      : q(heads(q_, "q", &v_)), k(heads(k_, "k", &v_)), v(heads(v_, "v")), T(q.size(0)), H(q.size(1)),
        D(q.size(2)), K(v.size(1)), E(v.size(2)) {
    TORCH_CHECK_VALUE(H > 0 && K % H == 0, K, " value heads cannot be shared out over ", H, " key heads");
    TORCH_CHECK(k.sizes() == q.sizes() && v.size(0) == T, "q, k and v have shapes ", q.sizes(), ", ",
                k.sizes(), " and ", v.sizes());
    g = dense(g_, at::kFloat, {T, K}, "g");
    beta = dense(beta_, at::kFloat, {T, K}, "beta");
    ends = ends_of(cu_seqlens, T);
  }
  int64_t segments() const { return ends.numel() - 1; }
  template <class U>
  DeltaChunks<U> as(double scale) const {
    return {rows_of<U>(q), rows_of<U>(k), rows_of<U>(v), g.const_data_ptr<float>(),
            beta.const_data_ptr<float>(), ends.const_data_ptr<int32_t>(), segments(), H, K, D, E, (float)scale};
  }
};

std::tuple<Tensor, Tensor, Tensor> delta_chunk(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const Tensor& cu_seqlens, double scale, const MaybeTensor& initial_, bool final_state, bool keep) {
  const DeltaInput in(q, k, v, g, beta, cu_seqlens);
  const auto wide = in.g.options();
  MaybeTensor initial;
  if (initial_) initial = dense(*initial_, at::kFloat, {in.segments(), in.K, in.D, in.E}, "initial_state");
  Tensor o = room({in.T, in.K, in.E}, in.v), last, before;
  last = at::empty({final_state ? in.segments() : 0, in.K, in.D, in.E}, wide);
  by_dtype(in.v, [&](auto type) {
    using U = decltype(type);
    const DeltaChunks<U> a = in.as<U>(scale);
    const int64_t chunks = keep ? chunk_starts(a.ends, a.segments).back() : 0;
    before = room({chunks, in.K, a.d(), a.e()}, in.g);
    delta_forward<U>(a, initial ? initial->const_data_ptr<float>() : nullptr, data<U>(o),
                     final_state ? last.data_ptr<float>() : nullptr, keep ? before.data_ptr<float>() : nullptr);
  });
  return {o, last, before};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_chunk_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const Tensor& cu_seqlens, double scale, const Tensor& before, const Tensor& do_, const MaybeTensor& dlast_,
    bool initial) {
  const DeltaInput in(q, k, v, g, beta, cu_seqlens);
  const Tensor grad = heads(do_, "do", &in.v);
  TORCH_CHECK(grad.sizes() == in.v.sizes(), "do has shape ", grad.sizes(), ", wanted ", in.v.sizes());
  MaybeTensor dlast;
  if (dlast_) dlast = dense(*dlast_, at::kFloat, {in.segments(), in.K, in.D, in.E}, "dlast");
  Tensor dq = room({in.T, in.H, in.D}, in.v), dk = room(dq.sizes(), dq);
  Tensor dv = room({in.T, in.K, in.E}, in.v);
  Tensor dg = at::empty({in.T, in.K}, in.g.options()), dbeta = at::empty_like(dg);
  Tensor dinitial = at::empty({initial ? in.segments() : 0, in.K, in.D, in.E}, in.g.options());
  by_dtype(in.v, [&](auto type) {
    using U = decltype(type);
    delta_backward<U>(in.as<U>(scale),
                      {rows_of<U>(grad), dlast ? dlast->const_data_ptr<float>() : nullptr,
                       before.const_data_ptr<float>(), data<U>(dq), data<U>(dk), data<U>(dv),
                       dg.data_ptr<float>(), dbeta.data_ptr<float>(),
                       initial ? dinitial.data_ptr<float>() : nullptr});
  });
  return {dq, dk, dv, dg, dbeta, dinitial};
}

struct ConvTensors {
  Tensor x, w, ends;
  MaybeTensor before;

  ConvTensors(const Tensor& x_, const Tensor& w_, const Tensor& cu_seqlens, const MaybeTensor& before_)
      : x(x_), w(dense(w_, x_.scalar_type(), w_.sizes(), "w")) {
    check_float(x_, "x");
    TORCH_CHECK(x_.dim() == 2 && w_.dim() == 2 && w_.size(0) == x_.size(1), "x and w have shapes ", x_.sizes(),
                " and ", w_.sizes());
    TORCH_CHECK_VALUE(w_.size(1) >= 1 && w_.size(1) <= MOST_TAPS, "a convolution of width ", w_.size(1));
    if (x.stride(1) != 1 && x.size(1) > 1) x = x.contiguous();
    ends = ends_of(cu_seqlens, x.size(0));
    if (before_)
      before = dense(*before_, x.scalar_type(), {ends.numel() - 1, x.size(1), w.size(1) - 1}, "initial_state");
  }
  template <class U>
  Conv<U> as() const {
    return {data<U>(x), x.stride(0), data<U>(w), data<U>(before), ends.const_data_ptr<int32_t>(),
            ends.numel() - 1, x.size(1), w.size(1)};
  }
};

std::tuple<Tensor, Tensor> conv_varlen(const Tensor& x, const Tensor& w, const Tensor& cu_seqlens,
                                       const MaybeTensor& initial, bool final_state) {
  const ConvTensors in(x, w, cu_seqlens, initial);
  Tensor y = room(in.x.sizes(), in.x);
  Tensor last = at::empty({final_state ? in.ends.numel() - 1 : 0, in.x.size(1), in.w.size(1) - 1}, y.options());
  by_dtype(in.x, [&](auto type) {
    using U = decltype(type);
    conv_forward<U>(in.as<U>(), data<U>(y), final_state ? data<U>(last) : nullptr);
  });
  return {y, last};
}

std::tuple<Tensor, Tensor, Tensor> conv_varlen_backward(const Tensor& x, const Tensor& w,
                                                        const Tensor& cu_seqlens, const MaybeTensor& initial,
                                                        const Tensor& dy_, const MaybeTensor& dlast_) {
  const ConvTensors in(x, w, cu_seqlens, initial);
  const int64_t S = in.ends.numel() - 1;
  const Tensor dy = dense(dy_, in.x.scalar_type(), in.x.sizes(), "dy");
  MaybeTensor dlast;
  if (dlast_) dlast = dense(*dlast_, in.x.scalar_type(), {S, in.x.size(1), in.w.size(1) - 1}, "dlast");
  Tensor dx = room(in.x.sizes(), in.x), dw = at::empty_like(in.w);
  Tensor dinitial = at::empty({initial ? S : 0, in.x.size(1), in.w.size(1) - 1}, dx.options());
  by_dtype(in.x, [&](auto type) {
    using U = decltype(type);
    conv_backward<U>(in.as<U>(), data<U>(dy), data<U>(dlast), data<U>(dx), data<U>(dw),
                     initial ? data<U>(dinitial) : nullptr);
  });
  return {dx, dw, dinitial};
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY_FRAGMENT(grpo_cpu, m) {
  m.def("delta_chunk(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens, float scale,"
        " Tensor? initial, bool final_state, bool keep) -> (Tensor, Tensor, Tensor)", grpo::delta_chunk);
  m.def("delta_chunk_backward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor cu_seqlens,"
        " float scale, Tensor before, Tensor do, Tensor? dlast, bool initial)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", grpo::delta_chunk_backward);
  m.def("conv_varlen(Tensor x, Tensor w, Tensor cu_seqlens, Tensor? initial, bool final_state)"
        " -> (Tensor, Tensor)", grpo::conv_varlen);
  m.def("conv_varlen_backward(Tensor x, Tensor w, Tensor cu_seqlens, Tensor? initial, Tensor dy,"
        " Tensor? dlast) -> (Tensor, Tensor, Tensor)", grpo::conv_varlen_backward);
}

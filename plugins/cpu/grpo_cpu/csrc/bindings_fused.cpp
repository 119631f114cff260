// torch.ops.grpo_cpu: norm, SwiGLU, rotary, sampling, AdamW and the row passes of the log-probs.
#include <cmath>
#include <vector>

#include "bindings.h"

namespace grpo {
namespace {

// Returns y, x + residual (x itself without one) and 1 / rms of each row (empty unless wanted).
std::tuple<Tensor, Tensor, Tensor> rms_norm(const Tensor& x_, const Tensor& w_, const MaybeTensor& residual_,
                                            double eps, bool zero_centered, bool keep) {
  const Tensor x = dense_float(x_, "x"), w = dense_float(w_, "w", &x_);
  const int64_t width = x.size(-1), rows = width ? x.numel() / width : 0;
  TORCH_CHECK(w.dim() == 1 && w.size(0) == width, "w has shape ", w.sizes(), ", wanted [", width, "]");
  MaybeTensor residual;
  if (residual_) {
    residual = dense_float(*residual_, "residual", &x_);
    TORCH_CHECK(residual->sizes() == x.sizes(), "residual has shape ", residual->sizes(), ", wanted ",
                x.sizes());
  }
  Tensor y = room(x.sizes(), x), total = residual ? room(x.sizes(), x) : x;
  Tensor inverse = at::empty({keep ? rows : 0}, x.options().dtype(at::kFloat));
  by_dtype(x, [&](auto kind) {
    using T = decltype(kind);
    norm_forward<T>({data<T>(x), data<T>(residual), data<T>(w), data<T>(y), residual ? data<T>(total) : nullptr,
                     keep ? inverse.data_ptr<float>() : nullptr, rows, width, (float)eps, zero_centered});
  });
  return {y, total, inverse};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& total, const Tensor& w, const Tensor& inverse,
                                             const Tensor& dy_, const MaybeTensor& dtotal_,
                                             bool zero_centered) {
  const Tensor dy = dense_float(dy_, "dy", &total), w_ = w.contiguous();
  MaybeTensor dtotal;
  if (dtotal_) dtotal = dense_float(*dtotal_, "dtotal", &total);
  Tensor dx = room(total.sizes(), total), dw = at::empty_like(w_);
  by_dtype(total, [&](auto kind) {
    using T = decltype(kind);
    norm_backward<T>({data<T>(total), data<T>(w_), data<T>(dy), data<T>(dtotal), inverse.data_ptr<float>(),
                      data<T>(dx), data<T>(dw), inverse.numel(), total.size(-1), zero_centered});
  });
  return {dx, dw};
}

Tensor swiglu(const Tensor& gate_up_) {
  const Tensor gate_up = dense_float(gate_up_, "gate_up");
  TORCH_CHECK(gate_up.size(-1) % 2 == 0, "gate_up has an odd width of ", gate_up.size(-1));
  auto shape = gate_up.sizes().vec();
  const int64_t width = shape.back() /= 2;
  Tensor y = room(shape, gate_up);
  if (y.numel())
    by_dtype(y, [&](auto kind) {
      using T = decltype(kind);
      swiglu_forward<T>(data<T>(gate_up), data<T>(y), y.numel() / width, width);
    });
  return y;
}

Tensor swiglu_grad(const Tensor& gate_up, const Tensor& dy_) {
  const Tensor dy = dense_float(dy_, "dy", &gate_up), x = gate_up.contiguous();
  Tensor dx = room(x.sizes(), x);
  if (dy.numel())
    by_dtype(x, [&](auto kind) {
      using T = decltype(kind);
      swiglu_backward<T>(data<T>(x), data<T>(dy), data<T>(dx), dy.numel() / dy.size(-1), dy.size(-1));
    });
  return dx;
}

Tensor rope(const Tensor& x_, const Tensor& cos_, const Tensor& sin_, bool interleaved, bool inverse) {
  const Tensor x = heads(x_, "x");
  const int64_t pairs = cos_.size(-1);
  const Tensor cos = dense(cos_, at::kFloat, {x.size(0), pairs}, "cos");
  const Tensor sin = dense(sin_, at::kFloat, {x.size(0), pairs}, "sin");
  TORCH_CHECK(2 * pairs <= x.size(2), "cos turns ", 2 * pairs, " dimensions of ", x.size(2));
  Tensor y = room(x.sizes(), x);
  if (y.numel())
    by_dtype(x, [&](auto kind) {
      using T = decltype(kind);
      rotate<T>({data<T>(x), x.stride(0), x.stride(1), data<T>(y), cos.data_ptr<float>(),
                 sin.data_ptr<float>(), x.size(0), x.size(1), x.size(2), pairs, interleaved, inverse});
    });
  return y;
}

// The last result is false where a row holds NaN, +inf or nothing but -inf.
std::tuple<Tensor, Tensor, Tensor, bool> sample(const Tensor& logits_, const Tensor& u_,
                                                const Tensor& temperature_, const MaybeTensor& top_k_,
                                                const MaybeTensor& top_p_,
                                                const MaybeTensor& min_p_) {
  const bool wide = logits_.scalar_type() != at::kBFloat16;
  TORCH_CHECK(logits_.dim() == 2 && logits_.size(1) > 0, "logits must be [rows, vocabulary], not ",
              logits_.sizes());
  const Tensor logits = wide ? logits_.to(at::kFloat).contiguous() : logits_.contiguous();
  const int64_t rows = logits.size(0);
  const Tensor u = dense(u_, at::kDouble, {rows}, "u");
  const Tensor temperature = dense(temperature_, at::kFloat, {rows}, "temperature");
  Tensor top_k, top_p, min_p;
  if (top_k_) top_k = dense(*top_k_, at::kLong, {rows}, "top_k");
  if (top_p_) top_p = dense(*top_p_, at::kFloat, {rows}, "top_p");
  if (min_p_) min_p = dense(*min_p_, at::kFloat, {rows}, "min_p");
  Tensor ids = at::empty({rows}, logits.options().dtype(at::kLong));
  Tensor logprob = at::empty({rows}, logits.options().dtype(at::kFloat)), logprob1 = at::empty_like(logprob);
  const bool sound = draw({logits.data_ptr(), wide, u.data_ptr<double>(), temperature.data_ptr<float>(),
                           top_p_ ? top_p.data_ptr<float>() : nullptr,
                           min_p_ ? min_p.data_ptr<float>() : nullptr,
                           top_k_ ? top_k.data_ptr<int64_t>() : nullptr, ids.data_ptr<int64_t>(),
                           logprob.data_ptr<float>(), logprob1.data_ptr<float>(), rows, logits.size(1)});
  return {ids, logprob, logprob1, sound};
}

template <class T>
LogitRows<T> logit_rows(const Tensor& logits, const Tensor& labels, double temperature, Tensor& logprob,
                        Tensor& entropy, Tensor& lse) {
  check_float(logits, "logits");
  const int64_t rows = logits.size(0);
  TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), "logits must be contiguous rows");
  TORCH_CHECK(labels.scalar_type() == at::kLong && labels.is_contiguous() && labels.numel() == rows,
              "labels do not fit");
  for (const Tensor& x : {logprob, entropy, lse})
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() == rows,
                "a result does not fit");
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t label = labels.data_ptr<int64_t>()[i];
    TORCH_CHECK_INDEX(label >= 0 && label < logits.size(1), "label ", label,
                      " lies outside of the vocabulary of ", logits.size(1));
  }
  return {data<T>(logits), labels.data_ptr<int64_t>(), logprob.data_ptr<float>(), entropy.data_ptr<float>(),
          lse.data_ptr<float>(), rows, logits.size(1), (float)(1 / temperature)};
}

void logprob_rows(const Tensor& logits, const Tensor& labels, double temperature, Tensor logprob,
                  Tensor entropy, Tensor lse) {
  by_dtype(logits, [&](auto type) {
    logits_forward(logit_rows<decltype(type)>(logits, labels, temperature, logprob, entropy, lse));
  });
}

void logprob_rows_backward(Tensor logits, const Tensor& labels, double temperature, const Tensor& g_logprob,
                           const Tensor& g_entropy, Tensor entropy, Tensor lse) {
  const int64_t rows = logits.size(0);
  const Tensor gl = dense(g_logprob, at::kFloat, {rows}, "g_logprob");
  const Tensor ge = dense(g_entropy, at::kFloat, {rows}, "g_entropy");
  by_dtype(logits, [&](auto type) {
    logits_backward(logit_rows<decltype(type)>(logits, labels, temperature, entropy, entropy, lse),
                    gl.data_ptr<float>(), ge.data_ptr<float>());
  });
}

void accumulate(Tensor total, const Tensor& part_) {
  const Tensor part = dense_bf16(part_, "part");
  TORCH_CHECK(total.scalar_type() == at::kFloat && total.is_contiguous() && total.sizes() == part.sizes(),
              "total has shape ", total.sizes(), ", part ", part.sizes());
  add_rows(total.data_ptr<float>(), bits(part), part.numel());
}

using TensorList = std::vector<Tensor>;

void adamw_step(const TensorList& params, const TensorList& grads, const TensorList& firsts,
                const TensorList& seconds, const std::vector<double>& decays,
                const c10::List<MaybeTensor>& copies,
                int64_t step, double lr, double beta1, double beta2, double eps, double grad_scale) {
  const size_t n = params.size();
  TORCH_CHECK(grads.size() == n && firsts.size() == n && seconds.size() == n && decays.size() == n &&
                  copies.size() == n,
              "adamw got lists of different lengths");
  std::vector<AdamWPart> parts;
  parts.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    for (const Tensor& x : {params[i], grads[i], firsts[i], seconds[i]})
      TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == params[i].sizes(),
                  "adamw wants contiguous float32 tensors of one shape for parameter ", i);
    const MaybeTensor copy = copies.get(i);
    if (copy) {
      check_bf16(*copy, "copy");
      TORCH_CHECK(copy->is_contiguous() && copy->sizes() == params[i].sizes(), "copy ", i, " does not fit");
    }
    parts.push_back({params[i].data_ptr<float>(), grads[i].data_ptr<float>(), firsts[i].data_ptr<float>(),
                     seconds[i].data_ptr<float>(), bits(copy), params[i].numel(),
                     (float)(1 - lr * decays[i])});
  }
  const double correction1 = 1 - std::pow(beta1, step), correction2 = 1 - std::pow(beta2, step);
  adamw(parts.data(), (int64_t)n,
        {(float)(1 - beta1), (float)beta2, (float)(1 - beta2), (float)(lr / correction1),
         (float)(1 / std::sqrt(correction2)), (float)eps, (float)grad_scale});
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY(grpo_cpu, m) {
  m.def("rms_norm(Tensor x, Tensor w, Tensor? residual, float eps, bool zero_centered, bool keep)"
        " -> (Tensor, Tensor, Tensor)", grpo::rms_norm);
  m.def("rms_norm_backward(Tensor total, Tensor w, Tensor inverse, Tensor dy, Tensor? dtotal,"
        " bool zero_centered) -> (Tensor, Tensor)", grpo::rms_norm_backward);
  m.def("swiglu(Tensor gate_up) -> Tensor", grpo::swiglu);
  m.def("swiglu_backward(Tensor gate_up, Tensor dy) -> Tensor", grpo::swiglu_grad);
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor", grpo::rope);
  m.def("sample(Tensor logits, Tensor u, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p)"
        " -> (Tensor, Tensor, Tensor, bool)", grpo::sample);
  m.def("logprob_rows(Tensor logits, Tensor labels, float temperature, Tensor(a!) logprob,"
        " Tensor(b!) entropy, Tensor(c!) lse) -> ()", grpo::logprob_rows);
  m.def("logprob_rows_backward(Tensor(a!) logits, Tensor labels, float temperature, Tensor g_logprob,"
        " Tensor g_entropy, Tensor entropy, Tensor lse) -> ()", grpo::logprob_rows_backward);
  m.def("accumulate(Tensor(a!) total, Tensor part) -> ()", grpo::accumulate);
  m.def("adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " float[] weight_decays, Tensor?[] copies, int step, float lr, float beta1, float beta2, float eps,"
        " float grad_scale) -> ()",
        grpo::adamw_step);
}

// torch.ops.grpo_cpu: the paged cache.
#include "bindings.h"

namespace grpo {
namespace {

template <class Work>
auto by_store(const Tensor& k, const Tensor& v, const Work& work) {
  check_float(k, "keys");
  check_float(v, "values", &k);
  return by_dtype(k, work);
}

template <class T>
CacheView<T> view(const Tensor& k, const Tensor& v, const Tensor& table) {
  TORCH_CHECK(k.dim() == 5 && v.dim() == 5 && k.is_contiguous() && v.is_contiguous(),
              "not the storage of a cache");
  TORCH_CHECK(table.scalar_type() == at::kInt && table.is_contiguous() && table.dim() == 2,
              "not a slot table");
  return {data<T>(k), data<T>(v), table.data_ptr<int32_t>(), table.size(0), (table.size(1) - 4) / 2, k.size(0),
          k.size(1), k.size(2) * k.size(4), v.size(3)};
}

template <class T>
void check_room(const CacheView<T>& c, const Tensor& slots, const Tensor& positions) {
  const int64_t bad =
      cache_check(c, slots.data_ptr<int64_t>(), positions.data_ptr<int64_t>(), slots.numel());
  TORCH_CHECK_INDEX(bad < 0, "slot ", slots.data_ptr<int64_t>()[bad < 0 ? 0 : bad],
                    " has no room of its own at position ", positions.data_ptr<int64_t>()[bad < 0 ? 0 : bad]);
}

template <class T>
void write_as(const Tensor& k_store, const Tensor& v_store, const Tensor& table, const Tensor& k_,
           const Tensor& v_, const Tensor& slots_, const Tensor& positions_) {
  const CacheView<T> c = view<T>(k_store, v_store, table);
  const Tensor k = heads(k_, "k", &k_store), v = heads(v_, "v", &k_store);
  const int64_t tokens = k.size(0);
  TORCH_CHECK(k.size(1) == c.kv_heads && k.size(2) == c.d, "k has shape ", k.sizes());
  TORCH_CHECK(v.size(0) == tokens && v.size(1) == c.kv_heads && v.size(2) == c.e, "v has shape ", v.sizes());
  const Tensor slots = dense(slots_, at::kLong, {tokens}, "slots");
  const Tensor positions = dense(positions_, at::kLong, {tokens}, "positions");
  if (!tokens) return;
  check_room(c, slots, positions);
  cache_write<T>(c, data<T>(k), k.stride(0), k.stride(1), data<T>(v), v.stride(0), v.stride(1),
              slots.data_ptr<int64_t>(), positions.data_ptr<int64_t>(), tokens);
}

template <class T>
Tensor attend_as(const Tensor& k_store, const Tensor& v_store, const Tensor& table, const Tensor& q_,
              const MaybeTensor& starts_, const Tensor& lengths_, const Tensor& slots_, double scale,
              int64_t window) {
  const CacheView<T> c = view<T>(k_store, v_store, table);
  const Tensor q = heads(q_, "q", &k_store);
  const int64_t sequences = slots_.numel();
  TORCH_CHECK(q.size(2) == c.d && q.size(1) % c.kv_heads == 0, "q has shape ", q.sizes(), " for ", c.kv_heads,
              " kv heads of ", c.d);
  const Tensor slots = dense(slots_, at::kLong, {sequences}, "slots");
  const Tensor lengths = dense(lengths_, at::kLong, {sequences}, "seqlens_k");
  Tensor starts;
  if (starts_) {
    starts = dense(*starts_, at::kLong, {sequences + 1}, "cu_seqlens_q");
    const int64_t* at = starts.data_ptr<int64_t>();
    bool rising = at[0] == 0 && at[sequences] == q.size(0);
    for (int64_t i = 0; i < sequences; ++i)
      rising = rising && at[i] <= at[i + 1] && at[i + 1] - at[i] <= lengths.data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(rising, "cu_seqlens_q must rise from 0 to ", q.size(0), " by no more than seqlens_k");
  } else {
    TORCH_CHECK_VALUE(q.size(0) == sequences, q.size(0), " queries for ", sequences, " slots");
  }
  Tensor o = at::empty({q.size(0), q.size(1), c.e}, q.options());
  if (!q.size(0)) return o;
  const int64_t bad =
      cache_check_lengths(c, slots.data_ptr<int64_t>(), lengths.data_ptr<int64_t>(), sequences);
  TORCH_CHECK_INDEX(bad < 0, "slot ", slots.data_ptr<int64_t>()[bad < 0 ? 0 : bad],
                    " holds fewer tokens than its length");
  cache_attend<T>(c, {data<T>(q), q.stride(0), q.stride(1), data<T>(o), slots.data_ptr<int64_t>(),
                   lengths.data_ptr<int64_t>(), starts_ ? starts.data_ptr<int64_t>() : nullptr, sequences,
                   q.size(1), (float)scale, window});
  return o;
}

template <class T>
Tensor step_as(const Tensor& k_store, const Tensor& v_store, const Tensor& table, const Tensor& qkv,
            const Tensor& cos_, const Tensor& sin_, const Tensor& positions_, const Tensor& slots_,
            int64_t num_heads, double scale, int64_t window, bool interleaved, const MaybeTensor& q_norm_,
            const MaybeTensor& k_norm_, double eps) {
  const CacheView<T> c = view<T>(k_store, v_store, table);
  check_float(qkv, "qkv", &k_store);
  const int64_t sequences = qkv.size(0), width = (num_heads + c.kv_heads) * c.d + c.kv_heads * c.e;
  TORCH_CHECK(qkv.dim() == 2 && qkv.size(1) == width && qkv.stride(1) == 1 && num_heads % c.kv_heads == 0,
              "qkv has shape ", qkv.sizes(), " and strides ", qkv.strides(), ", wanted rows of ", width);
  const int64_t pairs = cos_.size(-1);
  TORCH_CHECK(2 * pairs <= c.d, "cos turns ", 2 * pairs, " dimensions of ", c.d);
  const Tensor cos = dense(cos_, at::kFloat, {sequences, pairs}, "cos");
  const Tensor sin = dense(sin_, at::kFloat, {sequences, pairs}, "sin");
  const Tensor positions = dense(positions_, at::kLong, {sequences}, "positions");
  const Tensor slots = dense(slots_, at::kLong, {sequences}, "slots");
  TORCH_CHECK(q_norm_.has_value() == k_norm_.has_value(), "q_norm and k_norm come together");
  MaybeTensor q_norm, k_norm;
  if (q_norm_) {
    q_norm = dense(*q_norm_, qkv.scalar_type(), {c.d}, "q_norm");
    k_norm = dense(*k_norm_, qkv.scalar_type(), {c.d}, "k_norm");
  }
  Tensor o = at::empty({sequences, num_heads * c.e}, qkv.options());
  if (!sequences) return o;
  check_room(c, slots, positions);
  cache_step<T>(c, {data<T>(qkv), qkv.stride(0), cos.data_ptr<float>(), sin.data_ptr<float>(), data<T>(q_norm),
                 data<T>(k_norm), positions.data_ptr<int64_t>(), slots.data_ptr<int64_t>(), data<T>(o), sequences,
                 num_heads, pairs, window, (float)scale, (float)eps, interleaved});
  return o;
}

// Each of the three in the dtype of the cache.
void write(const Tensor& k_store, const Tensor& v_store, const Tensor& table, const Tensor& k, const Tensor& v,
           const Tensor& slots, const Tensor& positions) {
  by_store(k_store, v_store, [&](auto kind) {
    write_as<decltype(kind)>(k_store, v_store, table, k, v, slots, positions);
  });
}

Tensor attend(const Tensor& k_store, const Tensor& v_store, const Tensor& table, const Tensor& q,
              const MaybeTensor& starts, const Tensor& lengths, const Tensor& slots, double scale,
              int64_t window) {
  return by_store(k_store, v_store, [&](auto kind) {
    return attend_as<decltype(kind)>(k_store, v_store, table, q, starts, lengths, slots, scale, window);
  });
}

Tensor step(const Tensor& k_store, const Tensor& v_store, const Tensor& table, const Tensor& qkv,
            const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& slots,
            int64_t num_heads, double scale, int64_t window, bool interleaved, const MaybeTensor& q_norm,
            const MaybeTensor& k_norm, double eps) {
  return by_store(k_store, v_store, [&](auto kind) {
    return step_as<decltype(kind)>(k_store, v_store, table, qkv, cos, sin, positions, slots, num_heads, scale,
                                   window, interleaved, q_norm, k_norm, eps);
  });
}

}  // namespace
}  // namespace grpo

TORCH_LIBRARY_FRAGMENT(grpo_cpu, m) {
  m.def("cache_write(Tensor(a!) k_store, Tensor(b!) v_store, Tensor table, Tensor k, Tensor v, Tensor slots,"
        " Tensor positions) -> ()", grpo::write);
  m.def("cache_attend(Tensor k_store, Tensor v_store, Tensor table, Tensor q, Tensor? starts, Tensor lengths,"
        " Tensor slots, float scale, int window) -> Tensor", grpo::attend);
  m.def("cache_step(Tensor(a!) k_store, Tensor(b!) v_store, Tensor table, Tensor qkv, Tensor cos, Tensor sin,"
        " Tensor positions, Tensor slots, int num_heads, float scale, int window, bool interleaved,"
        " Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor", grpo::step);
}

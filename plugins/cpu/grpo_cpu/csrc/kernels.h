// Every kernel of the pack, over raw pointers: no torch header, so that each file compiles in seconds.
// T is bf16 or float.
#pragma once
#include <cstddef>
#include <cstdint>

namespace grpo {

using bf16 = uint16_t;

// --- rows.cpp, backward_rows.cpp: norms, SwiGLU, rotary -----------------------------------------------

template <class T>
struct Norm {
  const T *x, *residual, *w;  // residual may be null
  T *y, *total;               // total: x + residual, where there is a residual
  float* inverse;             // [rows], 1 / rms; may be null
  int64_t rows, width;
  float eps;
  bool zero_centered;
};
template <class T>
void norm_forward(const Norm<T>& a);

template <class T>
struct NormGrad {
  const T *total, *w, *dy, *dtotal;  // dtotal may be null
  const float* inverse;
  T *dx, *dw;
  int64_t rows, width;
  bool zero_centered;
};
template <class T>
void norm_backward(const NormGrad<T>& a);

template <class T>
void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t width);
template <class T>
void swiglu_backward(const T* gate_up, const T* dy, T* dgate_up, int64_t rows, int64_t width);

template <class T>
struct Rotary {
  const T* x;
  ptrdiff_t x_token, x_head;
  T* y;  // contiguous [tokens, heads, d]
  const float *cos, *sin;
  int64_t tokens, heads, d, pairs;
  bool interleaved, inverse;
};
template <class T>
void rotate(const Rotary<T>& a);

// --- sample.cpp ---------------------------------------------------------------------------------------

struct Draw {
  const void* logits;  // [rows, vocab], contiguous
  bool wide;           // float32 instead of bf16
  const double* u;
  const float *temperature, *top_p, *min_p;  // the last two may be null
  const int64_t* top_k;                      // may be null
  int64_t* ids;
  float *logprob, *logprob1;
  int64_t rows, vocab;
};
bool draw(const Draw& a);  // false: a row holds NaN, +inf or nothing but -inf

// --- adamw.cpp ----------------------------------------------------------------------------------------

struct AdamWPart {
  float* param;
  const float* grad;
  float *first, *second;
  bf16* copy;  // may be null
  int64_t size;
  float decay;  // 1 - lr * weight_decay
};
// Worked out in float64: float32 would be off by 1e-5 in 1 - beta2.
struct AdamWStep {
  float pull1, beta2, pull2;  // 1 - beta1, beta2, 1 - beta2
  float rate, unbias, eps;    // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  float grad_scale;
};
void adamw(const AdamWPart* parts, int64_t count, const AdamWStep& step);

// --- logprob.cpp --------------------------------------------------------------------------------------

template <class T>
struct LogitRows {
  T* logits;  // [rows, vocab]
  const int64_t* labels;
  float *logprob, *entropy, *lse;
  int64_t rows, vocab;
  float inverse_temperature;
};
template <class T>
void logits_forward(const LogitRows<T>& a);
template <class T>
void logits_backward(const LogitRows<T>& a, const float* g_logprob, const float* g_entropy);
void add_rows(float* total, const bf16* part, int64_t size);

// --- cache.cpp, step.cpp ------------------------------------------------------------------------------

// Blocks of 32 tokens, in units of 32 bits (a pair of bf16 or one float): keys [block][kv head][d / UNIT][32]
// [UNIT], values [block][kv head][32 / UNIT][e][UNIT].
template <class T>
struct CacheView {
  T *k, *v;
  // One row a slot: [blocks used, of these shared with the parent, parent or itself,
  //                  first position of each block (width + 1, then the end), block ids (width)].
  const int32_t* table;
  int64_t slots, width, blocks, kv_heads, d, e;
};
// Index of the first token that its slot has no room of its own for, or -1. Nothing is written then.
template <class T>
int64_t cache_check(const CacheView<T>& c, const int64_t* slots, const int64_t* positions, int64_t tokens);
// Index of the first sequence whose slot holds fewer tokens than its length, or -1.
template <class T>
int64_t cache_check_lengths(const CacheView<T>& c, const int64_t* slots, const int64_t* lengths,
                            int64_t sequences);
template <class T>
void cache_write(const CacheView<T>& c, const T* k, ptrdiff_t k_token, ptrdiff_t k_head, const T* v,
                 ptrdiff_t v_token, ptrdiff_t v_head, const int64_t* slots, const int64_t* positions,
                 int64_t tokens);

template <class T>
struct CacheQuery {
  const T* q;
  ptrdiff_t q_token, q_head;
  T* o;  // contiguous [tokens, heads, e]
  const int64_t *slots, *lengths;
  const int64_t* starts;  // [sequences + 1] into the tokens; null for one token each
  int64_t sequences, heads;
  float scale;
  int64_t window;  // 0 for none
};
template <class T>
void cache_attend(const CacheView<T>& c, const CacheQuery<T>& a);

template <class T>
struct StepInput {
  const T* qkv;
  ptrdiff_t qkv_row;
  const float *cos, *sin;
  const T *q_norm, *k_norm;  // may be null, together
  const int64_t *positions, *slots;
  T* o;
  int64_t sequences, heads, pairs, window;
  float scale, eps;
  bool interleaved;
};
template <class T>
void cache_step(const CacheView<T>& c, const StepInput<T>& a);

// --- segments_forward.cpp, segments_backward.cpp: training --------------------------------------------

template <class T>
struct Strided {
  const T* data;
  ptrdiff_t token, head;
};
template <class T>
struct Segments {
  Strided<T> q, k, v;
  const int32_t *ends, *parents;  // parents may be null
  int64_t count, heads, kv_heads, d, e, window;
  float scale;
  bool causal;
};
template <class T>
void segments_forward(const Segments<T>& a, T* o, float* lse);  // lse [heads, tokens]
template <class T>
void segments_backward(const Segments<T>& a, const T* o, const float* lse, Strided<T> grad, T* dq, T* dk,
                       T* dv);

// --- weight_grad.cpp ------------------------------------------------------------------------------------

template <class C>
struct WeightGrad {
  const bf16 *g, *x;  // [tokens, n], [tokens, k]
  ptrdiff_t g_row, x_row;
  C* c;  // [n, k], contiguous; float is added to, bf16 written
  int64_t tokens, n, k;
};
template <class C>
void weight_grad(const WeightGrad<C>& a);
// --- weight_grad_many.cpp: the same for few elements of C and many tokens
bool many_tokens(int64_t tokens, int64_t n, int64_t k);
template <class C>
void weight_grad_of_many(const WeightGrad<C>& a);
// --- weight_grad.cpp again: out [columns] = the sum of the rows of x, in float32
template <class T>
void row_sum(const T* x, ptrdiff_t stride, int64_t rows, int64_t columns, float* out);

// --- product.cpp ----------------------------------------------------------------------------------------

struct Product {
  const bf16* a;  // [m, k]
  ptrdiff_t a_row;
  const bf16* b;  // [k, n], or [n, k] where `transposed`; not read where `packed` is given
  ptrdiff_t b_row;
  bool transposed;
  const bf16* packed;  // by `pack`, or null
  const bf16* bias;    // [n] or null
  bf16* c;             // [m, n]
  ptrdiff_t c_row;
  int64_t m, n, k;  // k is even
};
void product(const Product& p);
int64_t packed_size(int64_t n, int64_t k);
void pack(const Product& p, bf16* out);

}  // namespace grpo

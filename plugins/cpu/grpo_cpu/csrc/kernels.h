// Every kernel of the pack, over raw pointers: no torch header, so that each file compiles in seconds.
#pragma once
#include <cstddef>
#include <cstdint>

namespace grpo {

using bf16 = uint16_t;

// --- rows.cpp, backward_rows.cpp: norms, SwiGLU, rotary -----------------------------------------------

struct Norm {
  const bf16 *x, *residual, *w;  // residual may be null
  bf16 *y, *total;               // total: x + residual, where there is a residual
  float* inverse;                // [rows], 1 / rms; may be null
  int64_t rows, width;
  float eps;
  bool zero_centered;
};
void norm_forward(const Norm& a);

struct NormGrad {
  const bf16 *total, *w, *dy, *dtotal;  // dtotal may be null
  const float* inverse;
  bf16 *dx, *dw;
  int64_t rows, width;
  bool zero_centered;
};
void norm_backward(const NormGrad& a);

void swiglu_forward(const bf16* gate_up, bf16* y, int64_t rows, int64_t width);
void swiglu_backward(const bf16* gate_up, const bf16* dy, bf16* dgate_up, int64_t rows, int64_t width);

struct Rotary {
  const bf16* x;
  ptrdiff_t x_token, x_head;
  bf16* y;  // contiguous [tokens, heads, d]
  const float *cos, *sin;
  int64_t tokens, heads, d, pairs;
  bool interleaved, inverse;
};
void rotate(const Rotary& a);

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

struct LogitRows {
  bf16* logits;  // [rows, vocab]
  const int64_t* labels;
  float *logprob, *entropy, *lse;
  int64_t rows, vocab;
  float inverse_temperature;
};
void logits_forward(const LogitRows& a);
void logits_backward(const LogitRows& a, const float* g_logprob, const float* g_entropy);
void add_rows(float* total, const bf16* part, int64_t size);

// --- cache.cpp, step.cpp ------------------------------------------------------------------------------

// Blocks of 32 tokens: keys [block][kv head][d / 2][32][2], values [block][kv head][16][e][2].
struct CacheView {
  bf16 *k, *v;
  // One row a slot: [blocks used, of these shared with the parent, parent or itself,
  //                  first position of each block (width + 1, then the end), block ids (width)].
  const int32_t* table;
  int64_t slots, width, blocks, kv_heads, d, e;
};
// Index of the first token that its slot has no room of its own for, or -1. Nothing is written then.
int64_t cache_check(const CacheView& c, const int64_t* slots, const int64_t* positions, int64_t tokens);
// Index of the first sequence whose slot holds fewer tokens than its length, or -1.
int64_t cache_check_lengths(const CacheView& c, const int64_t* slots, const int64_t* lengths,
                            int64_t sequences);
void cache_write(const CacheView& c, const bf16* k, ptrdiff_t k_token, ptrdiff_t k_head, const bf16* v,
                 ptrdiff_t v_token, ptrdiff_t v_head, const int64_t* slots, const int64_t* positions,
                 int64_t tokens);

struct CacheQuery {
  const bf16* q;
  ptrdiff_t q_token, q_head;
  bf16* o;  // contiguous [tokens, heads, e]
  const int64_t *slots, *lengths;
  const int64_t* starts;  // [sequences + 1] into the tokens; null for one token each
  int64_t sequences, heads;
  float scale;
  int64_t window;  // 0 for none
};
void cache_attend(const CacheView& c, const CacheQuery& a);

struct StepInput {
  const bf16* qkv;
  ptrdiff_t qkv_row;
  const float *cos, *sin;
  const bf16 *q_norm, *k_norm;  // may be null, together
  const int64_t *positions, *slots;
  bf16* o;
  int64_t sequences, heads, pairs, window;
  float scale, eps;
  bool interleaved;
};
void cache_step(const CacheView& c, const StepInput& a);

// --- segments_forward.cpp, segments_backward.cpp: training --------------------------------------------

struct Strided {
  const bf16* data;
  ptrdiff_t token, head;
};
struct Segments {
  Strided q, k, v;
  const int32_t *ends, *parents;  // parents may be null
  int64_t count, heads, kv_heads, d, e, window;
  float scale;
  bool causal;
};
void segments_forward(const Segments& a, bf16* o, float* lse);  // lse [heads, tokens]
void segments_backward(const Segments& a, const bf16* o, const float* lse, Strided grad, bf16* dq, bf16* dk,
                       bf16* dv);

}  // namespace grpo

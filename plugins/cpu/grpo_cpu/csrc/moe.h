// A mixture of experts over rows that are sorted by expert. T is bf16 or float.
#pragma once
#include <vector>

#include "simd.h"

namespace grpo {

template <class T>
struct Experts {
  const T* rows;               // [rows, c]
  const T *gate_up, *down;     // [experts, 2 f, c] and [experts, c, f]
  const int64_t* counts;       // [experts]
  int64_t experts, c, f;       // c and f are even for bf16
};
// y [rows, c]; gate_up_out [rows, 2 f] may be null. Overwrites hidden [rows, f].
template <class T>
void experts_forward(const Experts<T>& a, T* gate_up_out, T* hidden, T* y);
// An expert's rows.
struct Share {
  int64_t expert, start, rows;
};
// The same for some experts, see experts_many.cpp.
template <class T>
void experts_many(const Experts<T>& a, const std::vector<Share>& shares, T* gate_up_out, T* hidden, T* y);

template <class T>
struct ExpertsGrad {
  const T *gate_up_out, *dy;
  T *drows, *dgate_up, *ddown;  // of rows, gate_up and down; each may be null
  float *main_gate_up, *main_down;  // added to, instead of dgate_up and ddown; may be null
};
// Overwrites d_hidden [rows, 2 f] and hidden [rows, f], the gradient before and the value after SwiGLU.
template <class T>
void experts_backward(const Experts<T>& a, const ExpertsGrad<T>& g, T* d_hidden, T* hidden);

// --- route.cpp ----------------------------------------------------------------------------------------

struct Routing {
  const float* logits;   // [tokens, experts]
  const float* bias;     // [experts], may be null
  const int64_t* fixed;  // [tokens, k], may be null; rows of -1 are free
  int64_t tokens, experts, k, groups, kept_groups;
  bool sigmoid, norm;
  float scale;
};
// False where a row of fixed ids holds neither -1 alone nor ids alone.
bool route(const Routing& a, float* weights, int64_t* ids);

// --- pairs.cpp: a token's k rows ----------------------------------------------------------------------

// Counting sort of ids [n] into order [n] (pair of each row), places [n] (row of each pair) and counts; false
// where an id is out of range.
bool sort_pairs(const int64_t* ids, int64_t n, int64_t experts, int64_t* order, int64_t* places,
                int64_t* counts);
// y [tokens, c] = the sum of each token's k rows, weighted where `weights` [tokens, k] is given.
template <class T>
void sum_pairs(const T* rows, const float* weights, const int64_t* places, int64_t tokens, int64_t k,
               int64_t c, T* y);
// drows [tokens k, c] = weight times dy of the token; dweights = <dy of the token, row>. Each may be null.
template <class T>
void sum_pairs_backward(const T* rows, const float* weights, const int64_t* places, const T* dy,
                        int64_t tokens, int64_t k, int64_t c, T* drows, float* dweights);

}  // namespace grpo

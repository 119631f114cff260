// moe.route: scores, the choice of experts and their weights, token by token in float32.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "moe.h"

namespace grpo {
namespace {

// The largest values so far, largest first; of equal ones the one that came first. NaN counts as +inf.
struct Best {
  float* values;
  int64_t* ids;
  int64_t limit, count = 0;
  void offer(float value, int64_t id) {
    if (std::isnan(value)) value = std::numeric_limits<float>::infinity();
    if (count == limit && !(value > values[count - 1])) return;
    int64_t at = count < limit ? count++ : count - 1;
    for (; at > 0 && value > values[at - 1]; --at) values[at] = values[at - 1], ids[at] = ids[at - 1];
    values[at] = value, ids[at] = id;
  }
};

struct Room {
  std::vector<float> scores, worth, top;
  std::vector<int64_t> groups;
  explicit Room(const Routing& a)
      : scores(a.experts), worth(a.groups), top(std::max(a.k, a.kept_groups)), groups(a.kept_groups) {}
};

// softmax(x) of n values; x and y may be the same.
void softmax(const float* x, float* y, int64_t n) {
  __m512 high = _mm512_set1_ps(NEG_INF), total = _mm512_setzero_ps();
  each16(0, n, [&](int64_t i, auto m) { high = _mm512_mask_max_ps(high, m, high, load(x + i, m)); });
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(high));
  each16(0, n, [&](int64_t i, auto m) {
    const __m512 e = exp512(_mm512_sub_ps(load(x + i, m), top));
    total = _mm512_mask_add_ps(total, m, total, e);
    store(y + i, e, m);
  });
  const __m512 sum = _mm512_set1_ps(_mm512_reduce_add_ps(total));
  each16(0, n, [&](int64_t i, auto m) { store(y + i, _mm512_div_ps(load(y + i, m), sum), m); });
}

void scores_of(const Routing& a, const float* logits, float* scores) {
  if (!a.sigmoid) return softmax(logits, scores, a.experts);
  each16(0, a.experts, [&](int64_t i, auto m) { store(scores + i, sigmoid512(load(logits + i, m)), m); });
}

void choose(const Routing& a, Room& room, int64_t* ids) {
  const int64_t size = a.experts / a.groups;
  const auto value = [&](int64_t x) { return room.scores[x] + (a.bias ? a.bias[x] : 0.f); };
  Best groups{room.top.data(), room.groups.data(), a.kept_groups};
  for (int64_t g = 0; g < a.groups; ++g) {
    if (a.kept_groups == a.groups) {
      groups.offer(0.f, g);
      continue;
    }
    float pair[2];
    int64_t which[2];
    Best two{pair, which, std::min<int64_t>(2, size)};
    for (int64_t x = g * size; x < (g + 1) * size; ++x) two.offer(value(x), x);
    groups.offer(size > 1 ? pair[0] + pair[1] : pair[0], g);
  }
  // Ascending groups, so that of equal experts the lowest id comes first.
  std::sort(room.groups.begin(), room.groups.end());
  Best experts{room.top.data(), ids, a.k};
  for (const int64_t g : room.groups)
    for (int64_t x = g * size; x < (g + 1) * size; ++x) experts.offer(value(x), x);
}

// Takes over a row of fixed ids; false where it mixes -1 and ids, or an id is out of range.
bool replay(const Routing& a, const int64_t* fixed, int64_t* ids, bool& free) {
  free = fixed[0] == -1;
  for (int64_t j = 0; j < a.k; ++j) {
    if (free ? fixed[j] != -1 : fixed[j] < 0 || fixed[j] >= a.experts) return false;
    if (!free) ids[j] = fixed[j];
  }
  return true;
}

void weigh(const Routing& a, const float* logits, const float* scores, const int64_t* ids, float* weights) {
  if (a.norm && !a.sigmoid) {
    // Equal to a division of the chosen scores by their sum, and safe where that sum underflows.
    for (int64_t j = 0; j < a.k; ++j) weights[j] = logits[ids[j]];
    softmax(weights, weights, a.k);
  } else {
    for (int64_t j = 0; j < a.k; ++j) weights[j] = scores[ids[j]];
  }
  float sum = 0;
  for (int64_t j = 0; j < a.k; ++j) sum += weights[j];
  for (int64_t j = 0; j < a.k; ++j)
    weights[j] = (a.norm && a.sigmoid ? weights[j] / (sum + 1e-20f) : weights[j]) * a.scale;
}

}  // namespace

bool route(const Routing& a, float* weights, int64_t* ids) {
  std::atomic<bool> sound{true};
  at::parallel_for(0, a.tokens, std::max<int64_t>(1, 8192 / a.experts), [&](int64_t from, int64_t to) {
    Room room(a);
    for (int64_t t = from; t < to; ++t) {
      const float* logits = a.logits + t * a.experts;
      bool free = true;
      if (a.fixed && !replay(a, a.fixed + t * a.k, ids + t * a.k, free)) {
        sound = false;
        return;
      }
      scores_of(a, logits, room.scores.data());
      if (free) choose(a, room, ids + t * a.k);
      weigh(a, logits, room.scores.data(), ids + t * a.k, weights + t * a.k);
    }
  });
  return sound;
}

}  // namespace grpo

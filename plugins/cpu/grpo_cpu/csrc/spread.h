// Work of uneven size over the threads of torch.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace grpo {

// Runs work(task) for tasks 0..count-1; each thread takes the next one. Which thread runs a task changes
// nothing in its result.
template <class Work>
static void spread(int64_t count, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      for (int64_t task = next++; task < count; task = next++) work(task);
  });
}

// The same for work(row, column) of a grid whose rows' memory stays from call to call: a thread starts with its
// own share of the rows, still in its core's caches, one column after the other, and helps with the others'
// shares when that is done. No counter is fought for.
template <class Work>
static void spread_grid(int64_t rows, int64_t columns, const Work& work) {
  struct alignas(128) Share {
    std::atomic<int64_t> next{0};
    int64_t from = 0, count = 0;
  };
  if (!rows) return;
  const int64_t threads = std::min<int64_t>(rows, at::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) {
    shares[i].from = rows * i / threads;
    shares[i].count = rows * (i + 1) / threads - shares[i].from;
  }
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      for (int64_t j = 0; j < threads; ++j) {
        Share& share = shares[(i + j) % threads];
        for (int64_t k = share.next++; k < share.count * columns; k = share.next++)
          work(share.from + k % share.count, k / share.count);
      }
  });
}

}  // namespace grpo

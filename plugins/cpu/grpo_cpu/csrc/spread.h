// Work of uneven size over the threads of torch.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

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

}  // namespace grpo

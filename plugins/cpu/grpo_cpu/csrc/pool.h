// Uninitialised results of the pack's ops, see pool.cpp.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

namespace grpo {

// A contiguous tensor of `like`'s dtype on the CPU.
at::Tensor room(at::IntArrayRef shape, const at::Tensor& like);
// Gives memory that holds no tensor back to the system, if it is this much; how many bytes.
int64_t release_room(int64_t at_least);

}  // namespace grpo

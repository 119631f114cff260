// What a backend must bring itself: tensors, copies, views, generators and torch's hooks.
#include "device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>

namespace sim {
namespace {

using at::Tensor;
using c10::IntArrayRef;

// ---- generators

class Generator final : public at::CPUGeneratorImpl {
 public:
  explicit Generator(c10::DeviceIndex index) {
    device_ = c10::Device(kDevice, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  void set_state(const c10::TensorImpl& state) override {
    if (!quirk(kKeepRng)) at::CPUGeneratorImpl::set_state(state);
  }
};

at::Generator new_generator(c10::DeviceIndex index) { return at::make_generator<Generator>(index_or_current(index)); }

// ---- hooks

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return count(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_current(index); }
  c10::DeviceIndex getCurrentDevice() const override { return current(); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    auto old = current();
    set_current(index);
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current() : exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return new_generator(index); }
  at::Device getDeviceFromPtr(void* pointer) const override { return {kDevice, owner(pointer)}; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DeviceGuard guard(storage.device());
    auto block = device_allocator()->allocate(bytes);
    if (auto kept = std::min(bytes, storage.nbytes())) std::memcpy(block.get(), storage.data(), kept);
    auto& changed = const_cast<c10::Storage&>(storage);
    changed.set_data_ptr_noswap(std::move(block));
    changed.set_nbytes(bytes);
  }
};
const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// ---- creation

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != at::kDouble && dtype != at::kComplexDouble, "device 'sim' has no ", toString(dtype),
                   ": compute in float32, or in float64 on the host");
}

Tensor empty(IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == c10::Layout::Strided, "device 'sim' has strided tensors only");
  check_dtype(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(*device);
  return at::detail::empty_generic(sizes, device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  check_dtype(c10::dtype_or_default(dtype));
  c10::DeviceGuard guard(*device);
  return at::detail::empty_strided_generic(sizes, strides, device_allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// ---- copies

bool is_sim(const Tensor& tensor) { return tensor.device().type() == kDevice; }

// The copy lands when its stream is synchronised; until then its target holds poison. The source may change meanwhile.
void copy_late(const Tensor& source, const Tensor& target) {
  auto content = host_alias(source).clone();
  auto landing = target;
  std::memset(landing.mutable_data_ptr(), kPoison, landing.nbytes());
  later(current_stream(source.get_device()), [content, landing]() mutable {
    if (!quirk(kLostCopy)) landing.copy_(content);
  });
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  if (is_sim(source) && !is_sim(target)) {
    const bool late = non_blocking && target.is_contiguous() && target.numel() && is_pinned(target.storage().data());
    if (late && !quirk(kEarlyCopies)) {
      copy_late(source, target);
      return target;
    }
    synchronize_current_stream(source.get_device());
  }
  auto to = is_sim(target) ? host_alias(target) : target;
  to.copy_(is_sim(source) ? host_alias(source) : source);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  const_cast<Tensor&>(target).resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Scalar local_scalar_dense(const Tensor& tensor) {
  synchronize_current_stream(tensor.get_device());
  return at::native::_local_scalar_dense_cpu(host_alias(tensor));
}

// ---- views: the CPU's own, which never look at the memory

Tensor as_strided(const Tensor& x, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                  std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(x, sizes, strides, offset);
}
Tensor view(const Tensor& x, c10::SymIntArrayRef sizes) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(sizes)); }
Tensor reshape_alias(const Tensor& x, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}
const Tensor& resize(const Tensor& x, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(x.device());
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(sizes), format);
}
Tensor& set_tensor(Tensor& x, const Tensor& source) { return at::native::set_tensor_(x, source); }
Tensor& set_storage(Tensor& x, at::Storage source) { return at::native::set_(x, source); }
Tensor& set_view(Tensor& x, at::Storage source, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  return at::cpu::set_(x, source, offset, sizes, strides);
}
void record_stream(Tensor&, c10::Stream) {}

// `p.data = p.data.cpu()` moves a parameter, as it does between CPU and CUDA; torch refuses it to a PrivateUse1
// device that does not say so.
bool compatible_shallow_copy(const Tensor& a, const Tensor& b) {
  auto dense = [](c10::DispatchKeySet keys) {
    return keys.has(c10::DispatchKey::CPU) || keys.has(c10::DispatchKey::PrivateUse1);
  };
  return a.key_set() == b.key_set() || (dense(a.key_set()) && dense(b.key_set()));
}

// ---- convolutions: torch asks a backend without kernels of its own for these two

Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding,
                   int64_t groups) {
  std::optional<Tensor> host_bias;
  if (bias && bias->defined()) host_bias = host_alias(*bias);
  return to_device(at::convolution(host_alias(x), host_alias(w), host_bias, stride, padding, dilation, transposed,
                                   output_padding, groups),
                   x.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& x, const Tensor& w,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> mask) {
  const IntArrayRef bias_sizes(w.size(0));
  auto [dx, dw, db] = at::convolution_backward(host_alias(grad), host_alias(x), host_alias(w), bias_sizes, stride,
                                               padding, dilation, transposed, output_padding, groups, mask);
  auto back = [&](const Tensor& t) { return t.defined() ? to_device(t, grad.device()) : t; };
  return {back(dx), back(dw), back(db)};
}

}  // namespace

const at::Generator& default_generator(int64_t index) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < kMost; ++i) made.push_back(new_generator(static_cast<c10::DeviceIndex>(i)));
    return made;
  }();
  return all[index_or_current(index)];
}

LentGenerator::LentGenerator(at::Generator device)
    : cpu_(at::detail::createCPUGenerator()), device_(std::move(device)) {
  cpu_.set_state(device_.get_state());
}
LentGenerator::~LentGenerator() {
  // What a kernel has used up is not a state that somebody sets.
  device_.get<Generator>()->at::CPUGeneratorImpl::set_state(*cpu_.get_state().unsafeGetTensorImpl());
}

Tensor host_alias(const Tensor& tensor) {
  auto storage = tensor.storage();
  auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
  c10::DataPtr memory(storage.mutable_data(), new c10::Storage(storage), release, c10::kCPU);
  c10::Storage shared(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), nullptr, false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(shared), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

Tensor to_device(const Tensor& tensor, c10::Device device) {
  auto made = empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, device, {});
  if (tensor.numel()) host_alias(made).copy_(tensor);
  return made;
}

Tensor device_view(const Tensor& device, const Tensor& host) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(device.storage()), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  return made;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_view);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("record_stream", record_stream);
  m.impl("_has_compatible_shallow_copy_type", compatible_shallow_copy);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
}
// Without these two, the copy of a conjugate resolves it by copying it.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// What Python asks of the device, as torch.ops.grpo_sim.
TORCH_LIBRARY(grpo_sim, m) {
  m.def("device_count() -> int", [] { return int64_t{count()}; });
  m.def("set_device_count(int devices) -> ()", [](int64_t devices) { set_count(devices); });
  m.def("current_device() -> int", [] { return int64_t{current()}; });
  m.def("set_device(int index) -> ()", [](int64_t index) {
    TORCH_CHECK(index >= 0 && index < count(), "sim: there is no device ", index, " among ", int(count()));
    set_current(static_cast<c10::DeviceIndex>(index));
  });
  m.def("synchronize(int index) -> ()", [](int64_t i) { synchronize_device(static_cast<c10::DeviceIndex>(i)); });
  m.def("account(int index) -> int[]", [](int64_t index) { return account(index); });
  m.def("reset_peak(int index) -> ()", [](int64_t index) { reset_peak(index); });
  m.def("set_capacity(int index, int bytes) -> ()", [](int64_t index, int64_t bytes) { set_capacity(index, bytes); });
  m.def("rng_state(int index) -> Tensor", [](int64_t index) { return default_generator(index).get_state(); });
  m.def("set_rng_state(int index, Tensor state) -> ()",
        [](int64_t index, const Tensor& state) { at::Generator(default_generator(index)).set_state(state); });
  m.def("seed(int index, int seed) -> ()", [](int64_t index, int64_t seed) {
    at::Generator(default_generator(index)).set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("host_alias(Tensor(a) x) -> Tensor(a)", [](const Tensor& x) { return is_sim(x) ? host_alias(x) : x; });
  m.def("pending() -> int", [] { return pending(); });
  m.def("quirk(str name, bool on) -> ()", [](const std::string& name, bool on) { set_quirk(name, on); });
  m.def("deny(str[] names) -> ()", [](std::vector<std::string> names) { deny(std::move(names)); });
  m.def("inject(str name, int nth, str kind) -> ()",
        [](const std::string& name, int64_t nth, const std::string& kind) { inject(name, nth, kind); });
  m.def("clear_faults() -> ()", [] { clear_faults(); });
  m.def("count_calls(bool on) -> ()", [](bool on) { count_calls(on); });
  m.def("calls(str name) -> int", [](const std::string& name) { return calls(name); });
}

}  // namespace sim

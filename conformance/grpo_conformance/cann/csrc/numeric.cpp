// The numbers of the simulated NPU: the CPU's kernel on host aliases of the NPU's memory.
//
// torch_npu's own kernels call CANN's operators, which are not here. Of every aten operation that it registers, its
// kernel is replaced by the one below; those that only move memory, and all views, stay its own. So do dispatch,
// autograd, autocast, memory, streams, generators and process groups.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/StorageImpl.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using torch::jit::Stack;

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// ---- tensors

// A CPU storage on the memory of a device storage, which it keeps alive.
c10::Storage host_storage(const Tensor& tensor) {
  auto kept = std::make_unique<c10::Storage>(tensor.storage());
  auto* data = kept->mutable_data();
  auto bytes = kept->nbytes();
  c10::DataPtr pointer(data, kept.release(), [](void* owner) { delete static_cast<c10::Storage*>(owner); },
                       c10::Device(c10::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(pointer), nullptr, false);
}

Tensor on_storage(c10::Storage storage, const Tensor& tensor) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                       tensor.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return made;
}

Tensor host_alias(const Tensor& tensor) {
  TORCH_CHECK(tensor.device().type() == kDevice, "not a tensor of the NPU");
  return on_storage(host_storage(tensor), tensor);
}

Tensor to_device(const Tensor& tensor, c10::Device device) {
  auto options = tensor.options().device(device).requires_grad(false);
  auto made = tensor.is_non_overlapping_and_dense()
                  ? at::empty_strided(tensor.sizes(), tensor.strides(), options)
                  : at::empty(tensor.sizes(), options);
  if (tensor.numel()) host_alias(made).copy_(tensor);
  return made;
}

// ---- random numbers: each draw has a generator of its own, seeded by the NPU's seed and offset

uint64_t mixed(uint64_t seed, uint64_t offset) {
  uint64_t z = seed + 0x9e3779b97f4a7c15ull * (offset + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

uint64_t draw(at::Generator generator) {
  std::lock_guard<std::mutex> lock(generator.mutex());
  auto offset = generator.get_offset();
  generator.set_offset(offset + 4);
  return mixed(generator.current_seed(), offset);
}

// Lends the host's default generator to kernels that draw and take none.
class Lent {
 public:
  explicit Lent(uint64_t seed) : lock_(turn()), host_(at::detail::getDefaultCPUGenerator()) {
    std::lock_guard<std::mutex> lock(host_.mutex());
    before_ = host_.get_state();
    host_.set_current_seed(seed);
  }
  ~Lent() {
    std::lock_guard<std::mutex> lock(host_.mutex());
    host_.set_state(before_);
  }

 private:
  static std::mutex& turn() {
    static std::mutex mutex;
    return mutex;
  }
  std::lock_guard<std::mutex> lock_;
  at::Generator host_;
  Tensor before_;
};

// ---- what tests ask for

std::mutex mutex;
std::atomic<bool> counting{false};
std::vector<std::string> called;

// ---- one call

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), stack_(*stack), first_(stack->size() - op.schema().arguments().size()) {}

  void run() {
    bool takes_generator = false;
    for (size_t i = 0; i < schema_.arguments().size(); ++i)
      takes_generator = take(i) || takes_generator;
    TORCH_CHECK(!host_operand_ || aliases_.empty(), "Expected all tensors to be on the same device. Expected NPU ",
                "tensor, please check whether the input tensor device is correct. (", schema_.name(), ")");
    std::vector<Tensor> made;
    for (const auto& out : grown_) made.push_back(stack_[first_ + out.first].toTensor());
    std::unique_ptr<Lent> lent;
    if (!takes_generator && op_.hasTag(at::Tag::nondeterministic_seeded))
      lent = std::make_unique<Lent>(draw(default_generator()));
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    for (size_t i = 0; i < grown_.size(); ++i) {
      auto& target = grown_[i].second;
      target.resize_(made[i].sizes());
      if (target.numel()) host_alias(target).copy_(made[i]);
      aliases_.emplace_back(target, made[i]);
    }
    for (size_t i = stack_.size() - schema_.returns().size(); i < stack_.size(); ++i) give(stack_[i]);
  }

 private:
  void settle(c10::Device device) {
    TORCH_CHECK(!device_ || *device_ == device, "Expected all tensors to be on the same device, but found at least ",
                "two devices, ", *device_, " and ", device, "! (", schema_.name(), ")");
    device_ = device;
  }

  at::Generator default_generator() const {
    c10::Device device = device_.value_or(c10::Device(kDevice, -1));
    return at::globalContext().defaultGenerator(device);
  }

  Tensor alias(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kDevice) {
      host_operand_ = host_operand_ || (tensor.dim() && tensor.device().is_cpu() && !takes_host());
      return tensor;
    }
    settle(tensor.device());
    for (const auto& pair : aliases_)
      if (pair.first.is_same(tensor)) return pair.second;
    // Operands of one storage keep sharing one.
    for (const auto& pair : aliases_)
      if (pair.first.storage().is_alias_of(tensor.storage())) {
        aliases_.emplace_back(tensor, on_storage(pair.second.storage(), tensor));
        return aliases_.back().second;
      }
    aliases_.emplace_back(tensor, host_alias(tensor));
    return aliases_.back().second;
  }

  bool takes_host() const {
    static const std::set<std::string> names{"aten::index", "aten::index_put", "aten::index_put_", "aten::_foreach_copy_",
                                             "aten::_index_put_impl_", "aten::_unsafe_index"};
    return names.count(schema_.name());
  }

  // Replace an argument on the stack by what the CPU's kernel gets; whether it is a generator.
  bool take(size_t i) {
    const auto& argument = schema_.arguments()[i];
    auto& value = stack_[first_ + i];
    if (value.isTensor()) {
      auto tensor = value.toTensor();
      // An empty `out` grows; an alias cannot.
      if (argument.is_out() && tensor.defined() && tensor.device().type() == kDevice && !tensor.numel()) {
        settle(tensor.device());
        grown_.emplace_back(i, tensor);
        value = at::empty({0}, tensor.options().device(c10::kCPU));
      } else {
        value = alias(tensor);
      }
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) list.push_back(alias(tensor));
      value = list;
    } else if (value.isList() && argument.type()->str().find("Tensor?") == 0) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& item : value.toListRef())
        list.push_back(item.isNone() ? std::optional<Tensor>() : std::optional<Tensor>(alias(item.toTensor())));
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      device_ = value.toDevice();
      value = c10::Device(c10::kCPU);
    } else if (argument.name() == "generator") {
      auto generator = value.isNone() ? default_generator() : value.toGenerator();
      TORCH_CHECK(generator.device().type() == kDevice, "Expected a 'npu' device type for generator but found '",
                  generator.device().type(), "'");
      value = at::detail::createCPUGenerator(draw(generator));
      return true;
    }
    return false;
  }

  // An operand given back, a view of one, or something new.
  Tensor back(const Tensor& tensor) const {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (const auto& pair : aliases_)
      if (pair.second.is_same(tensor)) return pair.first;
    for (const auto& pair : aliases_)
      if (tensor.has_storage() && pair.second.is_alias_of(tensor))
        return at::as_strided(pair.first, tensor.sizes(), tensor.strides(), tensor.storage_offset());
    return to_device(tensor, device_.value_or(c10::Device(kDevice, -1)));
  }

  void give(c10::IValue& value) const {
    if (value.isTensor()) {
      value = back(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) list.push_back(back(tensor));
      value = list;
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack& stack_;
  size_t first_;
  std::optional<c10::Device> device_;
  bool host_operand_ = false;
  std::vector<std::pair<Tensor, Tensor>> aliases_;  // of the device, of the host
  std::vector<std::pair<size_t, Tensor>> grown_;    // `out` arguments by place
};

void compute(const c10::OperatorHandle& op, Stack* stack) {
  if (counting) {
    std::lock_guard<std::mutex> lock(mutex);
    called.push_back(op.schema().name());
  }
  Call(op, stack).run();
}

// ---- what is replaced

bool is_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.alias_info() && !result.alias_info()->isWrite()) return true;
  return false;
}

// Replaces the kernels of all aten operations but `kept` ones; how many.
int64_t install(std::vector<std::string> kept) {
  static std::unique_ptr<torch::Library> library;
  TORCH_CHECK(!library, "the numeric layer is installed already");
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten",
                                             std::make_optional(c10::DispatchKey::PrivateUse1), __FILE__, __LINE__);
  const std::set<std::string> native(kept.begin(), kept.end());
  auto& dispatcher = c10::Dispatcher::singleton();
  int64_t count = 0;
  for (const auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0 || native.count(name.name.substr(6))) continue;
    auto op = dispatcher.findSchema(name);
    if (!op || is_view(op->schema()) || !op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1) ||
        !op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU))
      continue;
    auto full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
    ++count;
  }
  return count;
}

void watch(bool on) {
  std::lock_guard<std::mutex> lock(mutex);
  counting = on;
  called.clear();
}

std::vector<std::string> watched() {
  std::lock_guard<std::mutex> lock(mutex);
  return called;
}

}  // namespace

TORCH_LIBRARY(grpo_cann, m) {
  m.def("install(str[] kept) -> int", [](c10::List<std::string> kept) {
    return install(std::vector<std::string>(kept.begin(), kept.end()));
  });
  m.def("watch(bool on) -> ()", &watch);
  m.def("watched() -> str[]", &watched);
  m.def("host_alias(Tensor tensor) -> Tensor");
}
TORCH_LIBRARY_IMPL(grpo_cann, PrivateUse1, m) { m.impl("host_alias", &host_alias); }

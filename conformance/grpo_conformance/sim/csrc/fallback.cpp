// Every other operation: the CPU's kernel on host aliases of the operands, all of which must live on one device.
//
// torch's own at::native::cpu_fallback copies, and takes operands from anywhere in silence; here a tensor of another
// device is refused, and so is one of the host unless it is a scalar.
#include "device.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <limits>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <unordered_set>

namespace sim {
namespace {

using at::Tensor;
using torch::jit::Stack;

// ---- operations by name

struct Fault {
  int64_t left;  // calls until it strikes, 0 for always
  std::string kind;
};
std::mutex mutex;
std::atomic<bool> watched{false};  // whether any of the following is used
std::unordered_set<std::string> denied;
std::unordered_map<std::string, Fault> faults;
std::unordered_map<std::string, int64_t> counts;
bool counting = false;

// The kind of the fault that strikes this call; empty for none.
std::string struck(const std::string& name) {
  if (!watched) return {};
  std::lock_guard<std::mutex> lock(mutex);
  if (counting) counts[name]++;
  TORCH_CHECK_NOT_IMPLEMENTED(!denied.count(name), name, " is not implemented on device 'sim'");
  auto found = faults.find(name);
  if (found == faults.end()) return {};
  auto& fault = found->second;
  if (fault.left == 0) return fault.kind;
  if (--fault.left > 0) return {};
  auto kind = fault.kind;
  faults.erase(found);
  return kind;
}

void spoil(const Tensor& result, const std::string& kind) {
  if (!result.defined() || !result.numel()) return;
  if (kind == "zero") result.zero_();
  if (kind == "nan" && result.is_floating_point()) result.fill_(std::numeric_limits<float>::quiet_NaN());
}

// ---- one call

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), stack_(*stack), first_(stack->size() - op.schema().arguments().size()) {}

  void run(const std::string& fault) {
    for (size_t i = 0; i < schema_.arguments().size(); ++i) take(i);
    TORCH_CHECK(!host_operand_ || aliases_.empty() || quirk(kAcceptHost), mixed("cpu"));
    std::vector<Tensor> made;
    for (const auto& out : grown_) made.push_back(stack_[first_ + out.first].toTensor());
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    for (size_t i = 0; i < grown_.size(); ++i) {
      auto& target = grown_[i].second;
      target.resize_(made[i].sizes());
      host_alias(target).copy_(made[i]);
      aliases_.emplace_back(target, made[i]);
    }
    const auto returns = schema_.returns().size();
    for (size_t i = stack_.size() - returns; i < stack_.size(); ++i) give(stack_[i], fault);
  }

 private:
  std::string mixed(const std::string& other) const {
    return c10::str("Expected all tensors to be on the same device, but found at least two devices, ", *device_,
                    " and ", other, "! (when executing ", schema_.name(), ")");
  }

  void settle(c10::Device device) {
    TORCH_CHECK(!device_ || *device_ == device, mixed(device.str()));
    device_ = device;
  }

  Tensor alias(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kDevice) {
      if (tensor.dim() && tensor.device().is_cpu()) host_operand_ = true;
      return tensor;
    }
    settle(tensor.device());
    for (const auto& pair : aliases_)
      if (pair.first.is_same(tensor)) return pair.second;
    aliases_.emplace_back(tensor, host_alias(tensor));
    return aliases_.back().second;
  }

  // Replace an argument on the stack by what the CPU's kernel gets.
  void take(size_t i) {
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
    } else if (value.isList() && optional_tensors(argument)) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& item : value.toListRef())
        list.push_back(item.isNone() ? std::optional<Tensor>() : std::optional<Tensor>(alias(item.toTensor())));
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kDevice) {
      device_ = value.toDevice();
      value = c10::Device(c10::kCPU);
    } else if (argument.name() == "generator") {
      auto generator = value.isNone() ? default_generator(device_ ? device_->index() : -1) : value.toGenerator();
      TORCH_CHECK(generator.device().type() == kDevice, "Expected a 'sim' device type for generator but found '",
                  generator.device().type(), "'");
      value = lent_.emplace(generator).cpu();
    }
  }

  static bool optional_tensors(const c10::Argument& argument) {
    return argument.type()->str().find("Tensor?") == 0;
  }

  Tensor back(const Tensor& tensor, const std::string& fault) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    auto result = returned(tensor);
    spoil(result, fault);
    return result;
  }

  // An operand given back, a view of one, or something new.
  Tensor returned(const Tensor& tensor) const {
    for (const auto& pair : aliases_)
      if (pair.second.is_same(tensor)) return pair.first;
    for (const auto& pair : aliases_)
      if (tensor.has_storage() && pair.second.is_alias_of(tensor)) return device_view(pair.first, tensor);
    return to_device(tensor, device_.value_or(c10::Device(kDevice, current())));
  }

  void give(c10::IValue& value, const std::string& fault) {
    if (value.isTensor()) {
      value = back(value.toTensor(), fault);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) list.push_back(back(tensor, fault));
      value = list;
    }
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack& stack_;
  size_t first_;
  std::optional<c10::Device> device_;
  bool host_operand_ = false;
  std::vector<std::pair<Tensor, Tensor>> aliases_;     // of the device, of the host
  std::vector<std::pair<size_t, Tensor>> grown_;       // `out` arguments by place
  std::optional<LentGenerator> lent_;
};

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& name = op.schema().name();
  const auto fault = struck(name);
  TORCH_CHECK(fault != "raise", "device-side error injected in ", name);
  Call(op, stack).run(fault);
}

}  // namespace

void deny(std::vector<std::string> names) {
  std::lock_guard<std::mutex> lock(mutex);
  denied = {names.begin(), names.end()};
  watched = true;
}
void inject(const std::string& name, int64_t nth, const std::string& kind) {
  TORCH_CHECK_VALUE(kind == "raise" || kind == "nan" || kind == "zero", "sim: there is no fault '", kind, "'");
  std::lock_guard<std::mutex> lock(mutex);
  faults[name] = {nth, kind};
  watched = true;
}
void clear_faults() {
  std::lock_guard<std::mutex> lock(mutex);
  faults.clear();
  denied.clear();
  watched = counting;
}
void count_calls(bool on) {
  std::lock_guard<std::mutex> lock(mutex);
  counting = on;
  counts.clear();
  watched = true;
}
int64_t calls(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = counts.find(name);
  return found == counts.end() ? 0 : found->second;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace sim

// The simulated accelerator: what its parts know of each other.
//
// A PrivateUse1 backend of torch over host memory. Kernels are the CPU's; what is simulated is everything around
// them: devices with an account and a capacity, streams, events and copies that land late, generators, and the
// refusal of operands that live elsewhere.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace sim {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kMost = 16;  // devices of a process
constexpr int kPoison = 0xFF;  // what memory holds that nobody has written: NaN, or -1 for integers

// ---- devices
c10::DeviceIndex count();
void set_count(int64_t devices);
c10::DeviceIndex current();
void set_current(c10::DeviceIndex index);
// The index, the current device for a negative one.
inline c10::DeviceIndex index_or_current(int64_t index) {
  return index < 0 ? current() : static_cast<c10::DeviceIndex>(index);
}

// ---- faults that tests of a conformance suite switch on
enum Quirk : uint32_t {
  kLeak = 1u << 0,          // freed memory stays in the account
  kLowPeak = 1u << 1,       // the peak does not follow
  kStuckPeak = 1u << 2,     // a reset leaves the peak
  kNoCapacity = 1u << 3,    // more is given out than there is
  kKeepRng = 1u << 4,       // setting a generator's state does nothing
  kAcceptHost = 1u << 5,    // operands on the host are read in silence
  kLostCopy = 1u << 6,      // late copies never land
  kEarlyCopies = 1u << 7,   // no copy is late
  kEarlyEvents = 1u << 8,   // events are over before the work in front of them
  kDeafStreams = 1u << 9,   // a stream does not wait for an event
  kPlainRefusal = 1u << 10, // running out is an ordinary RuntimeError
};
bool quirk(Quirk which);
void set_quirk(const std::string& name, bool on);

// ---- memory
c10::Allocator* device_allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* pointer);
c10::DeviceIndex owner(void* pointer);
void set_capacity(int64_t index, int64_t bytes);
// allocated, peak, allocated in all, freed in all, allocations, frees, refusals, capacity.
std::vector<int64_t> account(int64_t index);
void reset_peak(int64_t index);

// ---- streams: work that happens later
void later(const c10::Stream& stream, std::function<void()> work);
void synchronize_device(c10::DeviceIndex index);
void synchronize_current_stream(c10::DeviceIndex index);
c10::Stream current_stream(c10::DeviceIndex index);
int64_t pending();

// ---- generators
const at::Generator& default_generator(int64_t index);

// Lends a CPU generator with a device generator's state to a CPU kernel, and takes the state back.
class LentGenerator {
 public:
  explicit LentGenerator(at::Generator device);
  ~LentGenerator();
  LentGenerator(const LentGenerator&) = delete;
  LentGenerator& operator=(const LentGenerator&) = delete;
  const at::Generator& cpu() const { return cpu_; }

 private:
  at::Generator cpu_, device_;
};

// ---- tensors
// A CPU tensor on the memory of a device tensor; it keeps that memory alive.
at::Tensor host_alias(const at::Tensor& tensor);
// A copy on the device of a CPU tensor.
at::Tensor to_device(const at::Tensor& tensor, c10::Device device);
// A view on the storage of a device tensor with the sizes of a CPU view on its alias.
at::Tensor device_view(const at::Tensor& device, const at::Tensor& host);

// ---- operations by name
void deny(std::vector<std::string> names);
// Spoil call number `nth` (from 1; 0 is every call) of an operation: "raise", "nan" or "zero".
void inject(const std::string& name, int64_t nth, const std::string& kind);
void clear_faults();
void count_calls(bool on);
int64_t calls(const std::string& name);

}  // namespace sim

// Memory of the devices and pinned memory of the host.
#include "device.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

namespace sim {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPoisoned = size_t{1} << 30;  // of a block, so that the host need not have what nobody touches
constexpr int64_t kDefaultCapacity = int64_t{4} << 30;

struct Account {
  int64_t capacity = kDefaultCapacity, allocated = 0, peak = 0;
  int64_t total = 0, freed = 0, allocations = 0, frees = 0, refusals = 0;
};
// Lies in front of every block.
struct Header {
  int64_t bytes;
  c10::DeviceIndex device;
};
static_assert(sizeof(Header) <= kAlignment);

std::mutex mutex;
Account accounts[kMost];
std::unordered_map<const void*, size_t> pinned;
c10::DeviceIndex devices = 2;
thread_local c10::DeviceIndex selected = 0;
std::atomic<uint32_t> quirks{0};

const std::unordered_map<std::string, Quirk> kQuirks = {
    {"leak", kLeak},           {"low_peak", kLowPeak}, {"stuck_peak", kStuckPeak},   {"no_capacity", kNoCapacity},
    {"keep_rng", kKeepRng},    {"lost_copy", kLostCopy}, {"accept_host", kAcceptHost}, {"early_copies", kEarlyCopies},
    {"early_events", kEarlyEvents}, {"deaf_streams", kDeafStreams}, {"plain_refusal", kPlainRefusal},
};

void* aligned(size_t bytes) {
  void* block = std::aligned_alloc(kAlignment, (bytes + 2 * kAlignment - 1) / kAlignment * kAlignment);
  TORCH_CHECK(block, "the host has no ", bytes, " bytes for the simulated device");
  return block;
}

Header* header(void* pointer) { return reinterpret_cast<Header*>(static_cast<char*>(pointer) - kAlignment); }

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  static void release(void* pointer) {
    if (!pointer) return;
    auto* head = header(pointer);
    {
      std::lock_guard<std::mutex> lock(mutex);
      auto& account = accounts[head->device];
      if (!quirk(kLeak)) account.allocated -= head->bytes;
      account.freed += head->bytes;
      account.frees++;
    }
    std::free(head);
  }

  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(kDevice, selected);
    if (!bytes) return {nullptr, nullptr, &release, device};
    reserve(static_cast<int64_t>(bytes), device);
    auto* block = static_cast<char*>(aligned(bytes + kAlignment));
    auto* head = reinterpret_cast<Header*>(block);
    head->bytes = static_cast<int64_t>(bytes);
    head->device = selected;
    std::memset(block + kAlignment, kPoison, std::min(bytes, kPoisoned));
    return {block + kAlignment, block + kAlignment, &release, device};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(mutex);
    const auto& account = accounts[index];
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* row : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*row)[0].current = account.allocated;
      (*row)[0].peak = account.peak;
      (*row)[0].allocated = account.total;
      (*row)[0].freed = account.freed;
    }
    stats.num_ooms = account.refusals;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(mutex);
    accounts[index].total = accounts[index].freed = 0;
  }
  void resetPeakStats(c10::DeviceIndex index) override { reset_peak(index); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    std::lock_guard<std::mutex> lock(mutex);
    const auto& account = accounts[index];
    return {account.capacity - account.allocated, account.capacity};
  }

 private:
  static void reserve(int64_t bytes, c10::Device device) {
    std::lock_guard<std::mutex> lock(mutex);
    auto& account = accounts[device.index()];
    if (account.allocated + bytes > account.capacity && !quirk(kNoCapacity)) {
      account.refusals++;
      TORCH_CHECK(!quirk(kPlainRefusal), "sim: allocation of ", bytes, " bytes failed");
      TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory: ", bytes, " bytes asked for on ", device, ", ",
                       account.allocated, " of ", account.capacity, " in use");
    }
    account.allocated += bytes;
    account.total += bytes;
    account.allocations++;
    if (!quirk(kLowPeak)) account.peak = std::max(account.peak, account.allocated);
  }
};

class PinnedMemory final : public c10::Allocator {
 public:
  static void release(void* pointer) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      pinned.erase(pointer);
    }
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = aligned(bytes);
    std::lock_guard<std::mutex> lock(mutex);
    pinned[pointer] = bytes;
    return {pointer, pointer, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(kDevice, &device_memory);

}  // namespace

c10::DeviceIndex count() { return devices; }
void set_count(int64_t wanted) {
  TORCH_CHECK(wanted >= 1 && wanted <= kMost, "sim: 1 to ", kMost, " devices, not ", wanted);
  devices = static_cast<c10::DeviceIndex>(wanted);
}
c10::DeviceIndex current() { return selected; }
void set_current(c10::DeviceIndex index) { selected = index; }

bool quirk(Quirk which) { return quirks.load(std::memory_order_relaxed) & which; }
void set_quirk(const std::string& name, bool on) {
  auto found = kQuirks.find(name);
  TORCH_CHECK_VALUE(found != kQuirks.end(), "sim: there is no quirk '", name, "'");
  if (on) quirks |= found->second;
  else quirks &= ~static_cast<uint32_t>(found->second);
}

c10::Allocator* device_allocator() { return &device_memory; }
c10::Allocator* pinned_allocator() { return &pinned_memory; }
bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  return pinned.count(pointer) != 0;
}
c10::DeviceIndex owner(void* pointer) { return header(pointer)->device; }
void set_capacity(int64_t index, int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  accounts[index_or_current(index)].capacity = bytes;
}
std::vector<int64_t> account(int64_t index) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto& a = accounts[index_or_current(index)];
  return {a.allocated, a.peak, a.total, a.freed, a.allocations, a.frees, a.refusals, a.capacity};
}
void reset_peak(int64_t index) {
  std::lock_guard<std::mutex> lock(mutex);
  auto& account = accounts[index_or_current(index)];
  if (!quirk(kStuckPeak)) account.peak = account.allocated;
}

}  // namespace sim

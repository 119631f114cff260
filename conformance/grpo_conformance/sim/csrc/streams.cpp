// Streams, events and the guard. Kernels run at once; what is late is work handed to `later`: it is done when its
// stream, an event after it or its device is synchronised, never before.
#include "device.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>
#include <list>
#include <mutex>

namespace sim {
namespace {

struct Work {
  c10::Stream stream;
  uint64_t number;
  std::function<void()> run;
};
struct Event {
  c10::Stream stream{c10::Stream::DEFAULT, c10::Device(kDevice, 0)};
  uint64_t number = 0;
  double milliseconds = 0;
};

std::mutex mutex;
std::list<Work> queue;
uint64_t next_number = 1;
std::atomic<int64_t> next_stream{1};
thread_local c10::StreamId selected[kMost] = {};

using Chosen = std::function<bool(const Work&)>;

void finish(const Chosen& chosen) {
  std::list<Work> ready;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (auto at = queue.begin(); at != queue.end();) {
      auto here = at++;
      if (chosen(*here)) ready.splice(ready.end(), queue, here);
    }
  }
  for (auto& work : ready) work.run();
}

bool waits_for(const Chosen& chosen) {
  std::lock_guard<std::mutex> lock(mutex);
  for (const auto& work : queue)
    if (chosen(work)) return true;
  return false;
}

Chosen before(const Event& event) {
  return [event](const Work& work) { return work.stream == event.stream && work.number < event.number; };
}
Chosen on(const c10::Stream& stream) {
  return [stream](const Work& work) { return work.stream == stream; };
}

double now() {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device getDevice() const override { return {kDevice, current()}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto old = getDevice();
    setDevice(device);
    return old;
  }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() < count(), "sim: there is no device ", int(device.index()), " among ", int(count()));
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) set_current(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return count(); }

  c10::Stream getStream(c10::Device device) const noexcept override { return current_stream(device.index()); }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, device.index() < 0 ? getDevice() : device, next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    auto old = getStream(stream.device());
    selected[stream.device_index()] = stream.id();
    return old;
  }
  bool queryStream(const c10::Stream& stream) const override { return !waits_for(on(stream)); }
  void synchronizeStream(const c10::Stream& stream) const override { finish(on(stream)); }
  void synchronizeDevice(c10::DeviceIndex index) const override { synchronize_device(index); }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event();
    std::lock_guard<std::mutex> lock(mutex);
    *static_cast<Event*>(*event) = {stream, next_number++, now()};
  }
  // The host does not wait: a later synchronisation of `stream` finishes what came before the event too.
  void block(void* event, const c10::Stream& stream) const override {
    if (!event || quirk(kDeafStreams)) return;
    auto chosen = before(*static_cast<Event*>(event));
    if (waits_for(chosen)) later(stream, [chosen] { finish(chosen); });
  }
  bool queryEvent(void* event) const override {
    return !event || quirk(kEarlyEvents) || !waits_for(before(*static_cast<Event*>(event)));
  }
  void synchronizeEvent(void* event) const override {
    if (event && !quirk(kEarlyEvents)) finish(before(*static_cast<Event*>(event)));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    return static_cast<Event*>(second)->milliseconds - static_cast<Event*>(first)->milliseconds;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace

void later(const c10::Stream& stream, std::function<void()> work) {
  std::lock_guard<std::mutex> lock(mutex);
  queue.push_back({stream, next_number++, std::move(work)});
}
void synchronize_device(c10::DeviceIndex index) {
  index = index_or_current(index);
  finish([index](const Work& work) { return work.stream.device_index() == index; });
}
c10::Stream current_stream(c10::DeviceIndex index) {
  index = index_or_current(index);
  return c10::Stream(c10::Stream::UNSAFE, c10::Device(kDevice, index), selected[index]);
}
void synchronize_current_stream(c10::DeviceIndex index) { finish(on(current_stream(index))); }
int64_t pending() {
  std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int64_t>(queue.size());
}

}  // namespace sim

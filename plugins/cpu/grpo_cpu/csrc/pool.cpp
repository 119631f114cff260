// Memory of the large tensors that the pack's ops return.
//
// Activations come and go in a few sizes, over and over. The C library's heap fits each of them into the best
// of its holes, so that they wander over all of a heap that something else once made large, and page it in.
// Here a block goes back to a list of its size and serves the next tensor of that size. Blocks are cut from
// slabs, and slabs without a tensor go back to the system when asked. They are not put on large pages: where a
// virtual machine's host takes free memory away, a large page that comes back costs it 512 faults of its own.
#include "pool.h"

#include <ATen/EmptyTensor.h>
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace grpo {
namespace {

constexpr size_t SMALLEST = 256 << 10;  // smaller ones are left to torch
constexpr size_t GRAIN = 64 << 10, SLAB = 32 << 20;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* p = take(round_up(bytes, GRAIN));
    return {p, p, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // Returns the slabs that hold no tensor to the system, if they are this much; how many bytes that are.
  int64_t release(int64_t at_least) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t given = 0, idle = 0;
    for (const Slab& slab : slabs_) idle += slab.live ? 0 : (int64_t)slab.used;
    if (idle < at_least) return 0;
    for (size_t s = 0; s < slabs_.size(); ++s) {
      Slab& slab = slabs_[s];
      if (!slab.start || slab.live) continue;
      forget_blocks(s);
      munmap(slab.start, slab.size);
      given += (int64_t)slab.size;
      slab = {};
    }
    return given;
  }

 private:
  struct Slab {
    char* start = nullptr;
    size_t size = 0, used = 0, live = 0;
  };
  struct Block {
    void* start;
    size_t slab, size;
  };

  static void give_back(void* p);

  void* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // A little larger will do: the next batch's rows are never quite as many.
    auto found = free_.lower_bound(size);
    Block block;
    if (found != free_.end() && found->first <= size + size / 8) {
      block = found->second;
      free_.erase(found);
    } else {
      block = cut(size);
    }
    ++slabs_[block.slab].live;
    live_.emplace(block.start, block);
    return block.start;
  }

  Block cut(size_t size) {
    size_t place = place_for(size);
    if (place == slabs_.size()) slabs_.emplace_back();
    Slab& slab = slabs_[place];
    if (!slab.start) {
      slab.size = std::max(size, SLAB);
      void* p = mmap(nullptr, slab.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK_WITH(OutOfMemoryError, p != MAP_FAILED, "no memory for ", slab.size, " bytes");
      slab.start = (char*)p;
    } else if (!slab.live) {
      forget_blocks(place);
      slab.used = 0;
    }
    const Block block{slab.start + slab.used, place, size};
    slab.used += size;
    return block;
  }

  // Where to cut a block of a size that no free block has: from a slab without a tensor, whose blocks have
  // sizes that nobody asks for any more, else from the rest of a slab, else from a new one. Its pages are
  // there already.
  size_t place_for(size_t size) const {
    size_t rest = slabs_.size(), gap = slabs_.size();
    for (size_t s = 0; s < slabs_.size(); ++s) {
      const Slab& slab = slabs_[s];
      if (!slab.start) {
        gap = std::min(gap, s);
      } else if (!slab.live && slab.size >= size) {
        return s;
      } else if (slab.size - slab.used >= size) {
        rest = std::min(rest, s);
      }
    }
    return rest < slabs_.size() ? rest : gap;
  }

  void forget_blocks(size_t place) {
    for (auto it = free_.begin(); it != free_.end();)
      it = it->second.slab == place ? free_.erase(it) : std::next(it);
  }

  std::mutex mutex_;
  std::multimap<size_t, Block> free_;
  std::unordered_map<void*, Block> live_;
  std::vector<Slab> slabs_;
};

// Never destroyed: tensors may outlive everything else of the process.
Pool& pool() {
  static Pool* only = new Pool;
  return *only;
}

void Pool::give_back(void* p) {
  Pool& mine = pool();
  const std::lock_guard<std::mutex> lock(mine.mutex_);
  const auto found = mine.live_.find(p);
  const Block block = found->second;
  mine.live_.erase(found);
  --mine.slabs_[block.slab].live;
  // In front of those of its size: the one freed last is the first to go, still in the caches.
  mine.free_.emplace_hint(mine.free_.lower_bound(block.size), block.size, block);
}

}  // namespace

at::Tensor room(at::IntArrayRef shape, const at::Tensor& like) {
  const auto bytes = (size_t)c10::multiply_integers(shape) * like.element_size();
  if (bytes < SMALLEST) return at::empty(shape, like.options());
  return at::detail::empty_generic(shape, &pool(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   like.scalar_type(), std::nullopt);
}

int64_t release_room(int64_t at_least) { return pool().release(at_least); }

}  // namespace grpo

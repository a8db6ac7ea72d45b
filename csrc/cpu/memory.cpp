#include "memory.hpp"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#include <pthread.h>

#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace fastshift::cpu {
namespace {

constexpr std::size_t kPage = std::size_t{1} << 12;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::size_t round_up(std::size_t value, std::size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

#if defined(__SANITIZE_ADDRESS__)
// Each buffer by itself and of its exact size: what is used beyond its end or after its time shows.
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

// Large buffers are mapped one by one: in the heap what is let go may not go back to the system.
void* new_buffer(std::size_t size) {
  void* data = nullptr;
  if (!kKeeps) return posix_memalign(&data, 64, size) == 0 ? data : nullptr;
#if defined(__linux__)
  if (size >= kHugePage) {
    const std::size_t room = size + kHugePage;
    data = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    const std::size_t at = reinterpret_cast<std::size_t>(data);
    const std::size_t before = round_up(at, kHugePage) - at, behind = room - before - size;
    char* const from = static_cast<char*>(data) + before;
    if (before) munmap(data, before);
    if (behind) munmap(from + size, behind);
    madvise(from, size, MADV_HUGEPAGE);
    return from;
  }
#endif
  return std::aligned_alloc(size < kHugePage ? kPage : kHugePage, size);
}

void delete_buffer(void* data, std::size_t size) {
#if defined(__linux__)
  if (kKeeps && size >= kHugePage) {
    munmap(data, size);
    return;
  }
#endif
  (void)size;
  std::free(data);
}

class Memory {
 public:
  void* take(std::size_t bytes) {
    const std::size_t alignment = bytes < kHugePage ? kPage : kHugePage;
    std::size_t size = std::max<std::size_t>(bytes, 1);
    if (kKeeps) size = round_up(size, alignment);
    const std::lock_guard<std::mutex> lock(mutex_);
    void* data = nullptr;
    const auto found = kept_.lower_bound(size);
    if (found != kept_.end() && found->first <= size + size / 4) {  // a little too large will do
      size = found->first;
      data = found->second;
      use_.kept -= size;
      kept_.erase(found);
    } else {
      while (!kept_.empty() && use_.in_use + use_.kept + size > use_.peak) drop_largest();
      data = new_buffer(size);
      if (!data && !kept_.empty()) {
        while (!kept_.empty()) drop_largest();
        data = new_buffer(size);
      }
      if (!data) throw std::bad_alloc();
    }
    taken_[data] = size;
    use_.in_use += size;
    use_.peak = std::max(use_.peak, use_.in_use);
    return data;
  }

  void give(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = taken_.find(data);
    use_.in_use -= found->second;
    use_.kept += found->second;
    kept_.emplace(found->second, data);
    taken_.erase(found);
    while (!kKeeps && !kept_.empty()) drop_largest();
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!kept_.empty()) drop_largest();
    use_.peak = use_.in_use;
#if defined(__GLIBC__)
    malloc_trim(0);  // what lay in the heap
#endif
  }

  // Held while a process forks, so that no child finds it taken.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  MemoryUse use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return use_;
  }

 private:
  void drop_largest() {
    const auto last = std::prev(kept_.end());
    use_.kept -= last->first;
    delete_buffer(last->second, last->first);
    kept_.erase(last);
  }

  std::mutex mutex_;
  std::multimap<std::size_t, void*> kept_;
  std::unordered_map<void*, std::size_t> taken_;
  MemoryUse use_{};
};

// Never destroyed: tensors may outlive everything else.
Memory& memory();

Memory* make_memory() {
  pthread_atfork([] { memory().lock(); }, [] { memory().unlock(); }, [] { memory().unlock(); });
  return new Memory;
}

Memory& memory() {
  static Memory* instance = make_memory();
  return *instance;
}

}  // namespace

void* take_memory(std::size_t bytes) { return memory().take(bytes); }
void give_memory(void* data) { memory().give(data); }
void release_memory() { memory().release(); }
MemoryUse memory_use() { return memory().use(); }

}  // namespace fastshift::cpu

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

class Memory {
 public:
  void* take(std::size_t bytes) {
    const std::size_t alignment = bytes < kHugePage ? kPage : kHugePage;
    std::size_t size = kKeeps ? round_up(std::max<std::size_t>(bytes, 1), alignment)
                                     : std::max<std::size_t>(bytes, 1);
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
      if (kKeeps) {
        data = std::aligned_alloc(alignment, size);
      } else if (posix_memalign(&data, 64, size) != 0) {
        data = nullptr;
      }
      if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      if (kKeeps && alignment == kHugePage) madvise(data, size, MADV_HUGEPAGE);
#endif
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
    std::free(last->second);
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

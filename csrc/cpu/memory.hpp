// Large buffers that are used again and again, so that no step pays for fresh pages: kept when given
// back, in huge pages where the system has them.
#pragma once

#include <cstddef>

namespace fastshift::cpu {

struct MemoryUse {
  std::size_t in_use, kept, peak;  // bytes: handed out, given back and kept, most ever handed out
};

// Aligned for any vector; throws std::bad_alloc. What is kept and what is in use never add up to
// more than the most that was in use at once.
void* take_memory(std::size_t bytes);
void give_memory(void* data);
// Hand what is kept to the system.
void release_memory();
MemoryUse memory_use();

}  // namespace fastshift::cpu

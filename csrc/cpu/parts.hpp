// What the passes of a block have in common: scratch memory, groups of images, packed weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "block.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace fastshift::cpu {

// Grows, and is aligned for any vector.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  template <class T>
  T* get(int64_t count) {
    std::size_t bytes = std::max<std::size_t>(static_cast<std::size_t>(count) * sizeof(T), 1);
    if (kGrows) bytes = (bytes + 127) / 64 * 64;
    if (kGrows ? bytes > size_ : bytes != size_) {
      std::free(data_);
      data_ = nullptr;
      size_ = 0;
      if (posix_memalign(&data_, 64, bytes) != 0) {
        data_ = nullptr;
        throw std::bad_alloc();
      }
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  std::size_t size() const { return size_; }

#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool kGrows = false;  // of the size asked for, so that use beyond it shows
#else
  static constexpr bool kGrows = true;
#endif

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

enum Role { kPacked, kSums, kPartial, kNorm, kScratch, kHidden, kShortcut, kMoments, kRoles };

// Memory that one thread uses again and again.
template <class T>
T* scratch_memory(Role role, int64_t count) {
  static thread_local Buffer buffers[kRoles];
  return buffers[role].get<T>(count);
}

// Buffers that a thread lends out and takes back: memory fresh from the system costs a page fault a
// page. What they hold together stays small.
class Spare {
 public:
  // One that holds `bytes` if there is one, the smallest of those.
  std::unique_ptr<Buffer> take(std::size_t bytes) {
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const std::size_t size = (*it)->size();
      if (size >= bytes && (best == kept_.end() || size < (*best)->size())) best = it;
    }
    if (best == kept_.end()) return std::make_unique<Buffer>();
    std::unique_ptr<Buffer> found = std::move(*best);
    total_ -= found->size();
    kept_.erase(best);
    return found;
  }

  void give(std::unique_ptr<Buffer> buffer) {
    if (!Buffer::kGrows || total_ + buffer->size() > kMost) return;
    total_ += buffer->size();
    kept_.push_back(std::move(buffer));
  }

  static Spare& of_thread() {
    static thread_local Spare spare;
    return spare;
  }

 private:
  static constexpr std::size_t kMost = std::size_t{16} << 20;
  std::vector<std::unique_ptr<Buffer>> kept_;
  std::size_t total_ = 0;
};

// Large memory of one call.
class Work {
 public:
  Work() = default;
  explicit Work(int64_t bytes) { reset(bytes); }
  ~Work() { reset(0); }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;
  // Let go what there is, and take as much; zero: nothing.
  void reset(int64_t bytes) {
    if (data_) give_memory(data_);
    data_ = nullptr;
    if (bytes > 0) data_ = take_memory(static_cast<std::size_t>(bytes));
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

inline int64_t size_of(Element element) { return element == kFloat32 ? 4 : 2; }

// Elements on from an address.
inline const void* after(const void* from, int64_t elements, Element element) {
  return static_cast<const char*>(from) + elements * size_of(element);
}
inline void* after(void* from, int64_t elements, Element element) {
  return static_cast<char*>(from) + elements * size_of(element);
}

inline Geometry geometry_of(const Unit& unit, int64_t height, int64_t width) {
  return {height,           width,
          (height - 1) / unit.stride + 1, (width - 1) / unit.stride + 1,
          unit.in_channels, unit.out_channels,
          unit.kernel,      unit.stride};
}

inline int64_t weight_size(const Unit& unit) {
  const int64_t taps = int64_t{unit.kernel} * unit.kernel;
  return unit.in_channels * taps * (unit.depthwise ? 1 : unit.out_channels);
}

// Groups of images: a function of the shapes alone.
inline int group_count(const Unit& unit, const Images& images) {
  const int64_t room = (int64_t{4} << 20) / (4 * weight_size(unit));
  return static_cast<int>(std::min(images.count, std::clamp<int64_t>(room, 4, 16)));
}

// Of a backward pass, where each holds a gradient of the weights of its own, which is not to
// outweigh the rows.
inline int group_count(const Unit& unit, const Images& images, const Geometry& geometry) {
  const int64_t size = weight_size(unit), room = (int64_t{4} << 20) / (4 * size);
  const int64_t rows = images.count * geometry.out_height * geometry.out_width;
  const int64_t worth = rows * (unit.in_channels + unit.out_channels) / (8 * size);
  return static_cast<int>(std::min(images.count, std::clamp<int64_t>(std::min(room, worth), 2, 16)));
}

inline int64_t group_start(int group, int groups, int64_t count) { return count * group / groups; }

inline int64_t round_to_line(int64_t floats) { return (floats + 15) / 16 * 16; }

inline int64_t packed_floats(const Kernels& kernels, const Unit& unit, Element element) {
  if (unit.depthwise) return kernels.packed_depthwise(unit.in_channels, unit.kernel);
  const int64_t depth = unit.in_channels * unit.kernel * unit.kernel;
  return std::max(kernels.packed_product(depth, unit.out_channels, element),
                  kernels.packed_product(unit.out_channels, depth, element));
}

inline void pack_weight(const Kernels& kernels, const Unit& unit, const float* weight, bool forward,
                 Element element, float* to) {
  if (unit.depthwise) {
    kernels.pack_depthwise(weight, unit.in_channels, unit.kernel, forward, to);
  } else {
    kernels.pack_product(weight, unit.out_channels, unit.in_channels, unit.kernel, forward, element,
                         to);
  }
}

inline const float* packed_weight(const Kernels& kernels, const Unit& unit, const float* weight,
                           bool forward, Element element) {
  float* to = scratch_memory<float>(kPacked, packed_floats(kernels, unit, element));
  pack_weight(kernels, unit, weight, forward, element, to);
  return to;
}

inline Affine affine_of(const Unit& unit, const float* statistics) {
  return {statistics + 2 * unit.out_channels, statistics + 3 * unit.out_channels, unit.relu};
}

inline void parallel_rows(int64_t images, int64_t per_image, int threads,
                   const std::function<void(int64_t, int64_t)>& task) {
  const int groups = static_cast<int>(std::min<int64_t>(images, 32));
  parallel(groups, threads, [&](int group) {
    task(group_start(group, groups, images) * per_image,
         group_start(group + 1, groups, images) * per_image);
  });
}

}  // namespace fastshift::cpu

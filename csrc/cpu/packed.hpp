// A block's weights in the order that the kernels read, packed once for all passes of a call.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "block.hpp"
#include "parts.hpp"

namespace fastshift::cpu {

// For one thread at a time, and for as long as no weight changes.
class PackedWeights {
 public:
  explicit PackedWeights(const Block& block) : block_(&block), entries_(2 * block.num_units()) {}

  ~PackedWeights() {
    for (Entry& entry : entries_) {
      if (entry.memory) Spare::of_thread().give(std::move(entry.memory));
    }
  }
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  bool is_of(const Block& block) const { return block_ == &block; }

  // Of a unit of the block, for its output or for the gradient of its input.
  const float* get(const Kernels& kernels, const Unit& unit, int64_t index, const float* weight,
                   bool forward, Element element) {
    Entry& entry = entries_[2 * index + (forward ? 1 : 0)];
    if (entry.weight == weight && entry.kernels == &kernels && entry.element == element) {
      return entry.data;
    }
    entry.weight = nullptr;  // until it is packed
    const int64_t floats = packed_floats(kernels, unit, element);
    if (!entry.memory) entry.memory = Spare::of_thread().take(floats * sizeof(float));
    entry.data = entry.memory->get<float>(floats);
    pack_weight(kernels, unit, weight, forward, element, entry.data);
    entry.kernels = &kernels;
    entry.element = element;
    entry.weight = weight;
    return entry.data;
  }

 private:
  struct Entry {
    const Kernels* kernels = nullptr;
    const float* weight = nullptr;  // what was packed
    Element element = kFloat32;
    std::unique_ptr<Buffer> memory;
    float* data = nullptr;
  };
  const Block* block_;
  std::vector<Entry> entries_;
};

}  // namespace fastshift::cpu

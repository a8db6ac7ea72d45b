// A set of architectures of one length: rows in the order of insertion, found by open addressing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fastshift {

class ArchSet {
 public:
  explicit ArchSet(std::size_t num_blocks) : num_blocks_(num_blocks), slots_(64) {}

  std::size_t size() const { return size_; }
  const std::vector<std::uint8_t>& rows() const { return rows_; }  // [size, L]

  bool contains(const std::uint8_t* arch) const { return index_of(arch) != size_; }

  // How many were inserted before it; size() where it is not there.
  std::size_t index_of(const std::uint8_t* arch) const {
    const std::uint32_t row = slots_[find(arch, hash(arch))].row;
    return row == 0 ? size_ : row - 1;
  }

  // False where the architecture was there already.
  bool insert(const std::uint8_t* arch) {
    const std::uint64_t code = hash(arch);
    const std::size_t place = find(arch, code);
    if (slots_[place].row != 0) return false;
    rows_.insert(rows_.end(), arch, arch + num_blocks_);
    slots_[place] = {static_cast<std::uint32_t>(code >> 32), static_cast<std::uint32_t>(++size_)};
    if (2 * size_ > slots_.size()) grow();
    return true;
  }

  void clear() {
    rows_.clear();
    slots_.assign(slots_.size(), Slot{});
    size_ = 0;
  }

 private:
  struct Slot {
    std::uint32_t tag = 0;
    std::uint32_t row = 0;  // 1 + index of the row; 0: empty
  };

  std::uint64_t hash(const std::uint8_t* arch) const {
    std::uint64_t code = 0x9e3779b97f4a7c15U;
    for (std::size_t i = 0; i < num_blocks_; i += 8) {
      std::uint64_t word = 0;
      std::memcpy(&word, arch + i, num_blocks_ - i < 8 ? num_blocks_ - i : 8);
      code = (code ^ word) * 0xff51afd7ed558ccdU;
      code ^= code >> 32;
    }
    return code * 0xc4ceb9fe1a85ec53U;
  }

  // The slot that holds the architecture, or the empty one where it belongs.
  std::size_t find(const std::uint8_t* arch, std::uint64_t code) const {
    const std::size_t mask = slots_.size() - 1;
    const auto tag = static_cast<std::uint32_t>(code >> 32);
    std::size_t place = (code >> 20) & mask;
    while (slots_[place].row != 0) {
      const std::uint8_t* row = rows_.data() + (slots_[place].row - 1) * num_blocks_;
      if (slots_[place].tag == tag && std::memcmp(row, arch, num_blocks_) == 0) break;
      place = (place + 1) & mask;
    }
    return place;
  }

  void grow() {
    slots_.assign(2 * slots_.size(), Slot{});
    for (std::size_t row = 0; row < size_; ++row) {
      const std::uint8_t* arch = rows_.data() + row * num_blocks_;
      const std::uint64_t code = hash(arch);
      slots_[find(arch, code)] = {static_cast<std::uint32_t>(code >> 32),
                                  static_cast<std::uint32_t>(row + 1)};
    }
  }

  std::size_t num_blocks_;
  std::size_t size_ = 0;
  std::vector<std::uint8_t> rows_;
  std::vector<Slot> slots_;
};

}  // namespace fastshift

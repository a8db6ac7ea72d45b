// The trie plan: sorted architectures [P, L] in; the nodes of each level and the segments out.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastshift {

// One level: node m has the parent parent[m] on the level above, takes choice[m], and owns the
// candidates (leaves) [leaves[m], leaves[m + 1]).
struct TrieLevel {
  std::vector<std::int32_t> parent;
  std::vector<std::int32_t> choice;
  std::vector<std::int32_t> leaves;
};

struct TriePlan {
  std::vector<TrieLevel> levels;
  // [S, 5]: parent segment or -1, start level, stop level, first leaf, stop leaf
  std::vector<std::int32_t> segments;
};

class TrieBuilder {
 public:
  TrieBuilder(const std::uint8_t* archs, std::size_t num_archs, std::size_t num_blocks,
              std::int64_t subtrie_size)
      : archs_(archs), num_archs_(num_archs), num_blocks_(num_blocks) {
    const auto limit = static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max());
    if (num_archs == 0 || num_blocks == 0) {
      throw std::invalid_argument("archs: at least one row and one column expected, got shape (" +
                                  std::to_string(num_archs) + ", " + std::to_string(num_blocks) +
                                  ")");
    }
    if (num_archs >= limit || num_blocks >= limit) {
      throw std::invalid_argument("archs: fewer than 2^31 rows and columns expected");
    }
    if (subtrie_size < 1) {
      throw std::invalid_argument("subtrie_size: at least 1 expected, got " +
                                  std::to_string(subtrie_size));
    }
    subtrie_size_ = static_cast<std::size_t>(
        std::min<std::int64_t>(subtrie_size, static_cast<std::int64_t>(num_archs)));
  }

  TriePlan build() {
    find_splits();
    build_levels();
    cut(-1, 0, 0, num_archs_);
    return std::move(plan_);
  }

 private:
  // split_[i]: the first level on which row i differs from row i - 1; row i opens a node there
  // and on every level below.
  void find_splits() {
    split_.assign(num_archs_, 0);
    for (std::size_t row = 1; row < num_archs_; ++row) {
      const std::uint8_t* before = archs_ + (row - 1) * num_blocks_;
      const std::uint8_t* here = before + num_blocks_;
      const auto where = std::mismatch(here, here + num_blocks_, before);
      if (where.first == here + num_blocks_ || *where.first < *where.second) {
        throw std::invalid_argument(
            "archs: strictly increasing rows (lexicographic) expected, row " + std::to_string(row) +
            " does not follow row " + std::to_string(row - 1));
      }
      split_[row] = static_cast<std::size_t>(where.first - here);
    }
  }

  void build_levels() {
    plan_.levels.resize(num_blocks_);
    for (std::size_t level = 0; level < num_blocks_; ++level) {
      TrieLevel& nodes = plan_.levels[level];
      std::int32_t parent = -1;
      for (std::size_t row = 0; row < num_archs_; ++row) {
        if (row == 0 || split_[row] < level) ++parent;
        if (row > 0 && split_[row] > level) continue;
        nodes.parent.push_back(level == 0 ? 0 : parent);
        nodes.choice.push_back(archs_[row * num_blocks_ + level]);
        nodes.leaves.push_back(static_cast<std::int32_t>(row));
      }
      nodes.leaves.push_back(static_cast<std::int32_t>(num_archs_));
    }
  }

  // Cut the sibling subtrees that cover leaves [first, stop) and are rooted on `level`: neighbours
  // are packed into one segment up to the size, a sibling that is too big by itself becomes a
  // trunk (its unbranched head) whose children are cut in turn.
  void cut(std::int32_t parent, std::size_t level, std::size_t first, std::size_t stop) {
    std::size_t packed = first;  // the open group is [packed, child)
    for (std::size_t child = first; child < stop;) {
      std::size_t end = child + 1;
      while (end < stop && split_[end] > level) ++end;
      const bool is_large = end - child > subtrie_size_;
      if (child > packed && (is_large || end - packed > subtrie_size_)) {
        add_segment(parent, level, num_blocks_, packed, child);
        packed = child;
      }
      if (is_large) {
        const std::size_t branch =
            *std::min_element(split_.begin() + static_cast<std::ptrdiff_t>(child) + 1,
                              split_.begin() + static_cast<std::ptrdiff_t>(end));
        const std::int32_t trunk = add_segment(parent, level, branch, child, end);
        cut(trunk, branch, child, end);
        packed = end;
      }
      child = end;
    }
    if (stop > packed) add_segment(parent, level, num_blocks_, packed, stop);
  }

  std::int32_t add_segment(std::int32_t parent, std::size_t start, std::size_t stop,
                           std::size_t first_leaf, std::size_t stop_leaf) {
    plan_.segments.push_back(parent);
    for (const std::size_t value : {start, stop, first_leaf, stop_leaf}) {
      plan_.segments.push_back(static_cast<std::int32_t>(value));
    }
    return static_cast<std::int32_t>(plan_.segments.size() / 5) - 1;
  }

  const std::uint8_t* archs_;
  std::size_t num_archs_;
  std::size_t num_blocks_;
  std::size_t subtrie_size_ = 1;
  std::vector<std::size_t> split_;
  TriePlan plan_;
};

}  // namespace fastshift

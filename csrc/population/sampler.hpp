// Architectures uniform over a feasible set, by counting completions: no rejection where costs are
// whole numbers of bins, and rejection from a counted superset where they are not.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rng.hpp"

namespace fastshift {

// low <= fixed + sum over blocks of costs[block][choice] <= high
struct CostBound {
  std::vector<double> costs;  // [L, O]
  double fixed;
  double low;
  double high;
};

// Counts are little-endian numbers of `limbs` words. Every count is at most the size of the space,
// which is below 2^(64 limbs) by construction, so no sum of counts of one prefix can overflow.
class Sampler {
 public:
  using Rank = std::vector<std::uint64_t>;

  // Draws before a draw gives up where the bounds are narrower than the bins.
  static constexpr std::uint64_t kMaxProposals = 100000;

  // bins: [L, O], every choice's cost in bins, at least 0; low_bin and high_bin bound their sum.
  Sampler(std::vector<std::int32_t> num_choices, std::size_t max_choices,
          std::vector<std::int32_t> bins, std::int64_t low_bin, std::int64_t high_bin,
          std::vector<CostBound> bounds)
      : num_choices_(std::move(num_choices)),
        max_choices_(max_choices),
        bins_(std::move(bins)),
        bounds_(std::move(bounds)) {
    check();
    std::size_t bits = 0;
    for (const std::int32_t n : num_choices_) bits += bit_length(static_cast<std::uint64_t>(n - 1));
    limbs_ = bits / 64 + 1;
    count_completions(low_bin, high_bin);
    const std::uint64_t* total = completions(0, 0);
    count_.assign(total, total + limbs_);
    measure_ranks();
  }

  std::size_t num_blocks() const { return num_choices_.size(); }
  std::size_t limbs() const { return limbs_; }
  const std::vector<std::int32_t>& num_choices() const { return num_choices_; }
  // Architectures within the bins, the feasible ones among them.
  const Rank& count() const { return count_; }
  bool has_count_up_to(std::uint64_t limit) const {
    return std::all_of(count_.begin() + 1, count_.end(), [](auto limb) { return limb == 0; }) &&
           count_[0] <= limit;
  }

  bool is_member(const std::uint8_t* arch) const {
    for (std::size_t block = 0; block < num_blocks(); ++block) {
      if (arch[block] >= num_choices_[block]) return false;
    }
    return true;
  }

  bool is_feasible(const std::uint8_t* arch) const {
    for (const CostBound& bound : bounds_) {
      double cost = bound.fixed;
      const double* row = bound.costs.data();
      for (std::size_t block = 0; block < num_blocks(); ++block, row += max_choices_) {
        cost += row[arch[block]];
      }
      if (!(bound.low <= cost && cost <= bound.high)) return false;
    }
    return true;
  }

  // The architecture at a rank below count(), in lexicographic order. `rank` is used up.
  void unrank(Rank& rank, std::uint8_t* arch) const {
    if (limbs_ == 1) return unrank_word(rank[0], arch);
    std::int64_t sum = 0;
    for (std::size_t block = 0; block < num_blocks(); ++block) {
      const std::int32_t* bins = bins_.data() + block * max_choices_;
      std::int32_t choice = 0;
      for (; choice + 1 < num_choices_[block]; ++choice) {
        const std::uint64_t* count = completions(block + 1, sum + bins[choice]);
        if (is_less(rank.data(), count)) break;
        subtract(rank.data(), count);
      }
      arch[block] = static_cast<std::uint8_t>(choice);
      sum += bins[choice];
    }
  }

  // [num, L], of ranks that fit one word.
  std::vector<std::uint8_t> unrank_all(const std::uint64_t* ranks, std::size_t num) const {
    std::vector<std::uint8_t> archs(num * num_blocks());
    for (std::size_t i = 0; i < num; ++i) {
      if (has_count_up_to(ranks[i])) {
        throw std::out_of_range("ranks: below the count expected, got " + std::to_string(ranks[i]));
      }
      Rank rank(limbs_, 0);
      rank[0] = ranks[i];
      unrank(rank, archs.data() + i * num_blocks());
    }
    return archs;
  }

  // Up to `num` feasible architectures, [num, L]: fewer where a draw gives up.
  std::vector<std::uint8_t> sample(Rng& rng, std::size_t num, std::uint64_t& proposals) const {
    std::vector<std::uint8_t> archs(num * num_blocks());
    Rank rank;
    for (std::size_t i = 0; i < num; ++i) {
      if (draw(rng, archs.data() + i * num_blocks(), rank, proposals)) continue;
      archs.resize(i * num_blocks());
      break;
    }
    return archs;
  }

  // A feasible architecture, each with the same probability; false where none turned up in
  // kMaxProposals draws from the bins. `rank` is scratch; `proposals` counts the draws.
  bool draw(Rng& rng, std::uint8_t* arch, Rank& rank, std::uint64_t& proposals) const {
    if (has_count_up_to(0)) return false;
    for (std::uint64_t proposal = 0; proposal < kMaxProposals; ++proposal) {
      ++proposals;
      draw_rank(rng, rank);
      unrank(rank, arch);
      if (is_feasible(arch)) return true;
    }
    return false;
  }

 private:
  // Counts for the prefix sums first .. first + size - 1 of a level, and a 0 for all other sums.
  struct Band {
    std::int64_t first = 0;
    std::int64_t size = 0;
    std::size_t offset = 0;
  };

  // The same for counts of one word, without a branch that depends on the rank.
  void unrank_word(std::uint64_t rank, std::uint8_t* arch) const {
    std::int64_t sum = 0;
    for (std::size_t block = 0; block < num_blocks(); ++block) {
      const std::int32_t* bins = bins_.data() + block * max_choices_;
      std::uint64_t before = 0;  // ranks of lower choices
      std::uint64_t passed = 0;
      std::int32_t choice = 0;
      for (std::int32_t next = 0; next + 1 < num_choices_[block]; ++next) {
        before += *completions(block + 1, sum + bins[next]);
        const bool is_passed = rank >= before;
        choice += static_cast<std::int32_t>(is_passed);
        passed = is_passed ? before : passed;
      }
      arch[block] = static_cast<std::uint8_t>(choice);
      sum += bins[choice];
      rank -= passed;
    }
  }

  static std::size_t bit_length(std::uint64_t x) {
    std::size_t bits = 0;
    for (; x != 0; x >>= 1) ++bits;
    return bits;
  }

  void check() const {
    if (num_choices_.empty()) throw std::invalid_argument("num_choices: at least one expected");
    for (const std::int32_t n : num_choices_) {
      if (n < 1 || n > 256 || static_cast<std::size_t>(n) > max_choices_) {
        throw std::invalid_argument("num_choices: 1 to 256 choices, at most the columns of bins, "
                                    "expected for each block, got " + std::to_string(n));
      }
    }
    const std::size_t size = num_blocks() * max_choices_;
    if (bins_.size() != size) throw std::invalid_argument("bins: shape [L, O] expected");
    if (std::any_of(bins_.begin(), bins_.end(), [](std::int32_t bin) { return bin < 0; })) {
      throw std::invalid_argument("bins: no negative entry expected");
    }
    for (const CostBound& bound : bounds_) {
      if (bound.costs.size() != size) throw std::invalid_argument("bounds: costs [L, O] expected");
    }
  }

  void count_completions(std::int64_t low_bin, std::int64_t high_bin) {
    const std::size_t num = num_blocks();
    std::vector<std::int64_t> before_min(num + 1, 0), before_max(num + 1, 0);
    for (std::size_t block = 0; block < num; ++block) {
      const auto row = bins_.begin() + static_cast<std::ptrdiff_t>(block * max_choices_);
      const auto range = std::minmax_element(row, row + num_choices_[block]);
      before_min[block + 1] = before_min[block] + *range.first;
      before_max[block + 1] = before_max[block] + *range.second;
    }
    low_bin = std::max(low_bin, before_min[num]);
    high_bin = std::min(high_bin, before_max[num]);
    bands_.resize(num + 1);
    std::size_t words = 0;
    for (std::size_t level = 0; level <= num; ++level) {
      const std::int64_t after_min = before_min[num] - before_min[level];
      const std::int64_t after_max = before_max[num] - before_max[level];
      const std::int64_t first = std::max(before_min[level], low_bin - after_max);
      const std::int64_t last = std::min(before_max[level], high_bin - after_min);
      bands_[level] = {first, std::max<std::int64_t>(last - first + 1, 0), words};
      words += static_cast<std::size_t>(bands_[level].size + 1) * limbs_;
    }
    table_.assign(words, 0);
    for (std::int64_t sum = 0; sum < bands_[num].size; ++sum) {
      table_[bands_[num].offset + static_cast<std::size_t>(sum) * limbs_] = 1;
    }
    for (std::size_t block = num; block-- > 0;) {
      const Band& band = bands_[block];
      for (std::int64_t i = 0; i < band.size; ++i) {
        std::uint64_t* here = table_.data() + band.offset + static_cast<std::size_t>(i) * limbs_;
        for (std::int32_t choice = 0; choice < num_choices_[block]; ++choice) {
          const auto place = block * max_choices_ + static_cast<std::size_t>(choice);
          add(here, completions(block + 1, band.first + i + bins_[place]));
        }
      }
    }
  }

  // How many ways there are to choose blocks level .. L - 1 after a prefix that costs `sum` bins.
  const std::uint64_t* completions(std::size_t level, std::int64_t sum) const {
    const Band& band = bands_[level];
    const auto place = static_cast<std::uint64_t>(sum - band.first);  // huge where sum is too low
    const auto end = static_cast<std::uint64_t>(band.size);
    return table_.data() + band.offset + static_cast<std::size_t>(std::min(place, end)) * limbs_;
  }

  // The words, and the bits of the last one, that the largest rank fills.
  void measure_ranks() {
    if (has_count_up_to(0)) return;
    Rank last = count_;
    Rank one(limbs_, 0);
    one[0] = 1;
    subtract(last.data(), one.data());
    rank_words_ = limbs_;
    while (rank_words_ > 0 && last[rank_words_ - 1] == 0) --rank_words_;
    if (rank_words_ > 0) rank_mask_ = ~std::uint64_t{0} >> (64 - bit_length(last[rank_words_ - 1]));
  }

  void draw_rank(Rng& rng, Rank& rank) const {
    rank.assign(limbs_, 0);
    for (int redraw = 0; redraw < kMaxRedraws; ++redraw) {
      for (std::size_t i = 0; i < rank_words_; ++i) rank[i] = rng.next();
      if (rank_words_ > 0) rank[rank_words_ - 1] &= rank_mask_;
      if (is_less(rank.data(), count_.data())) return;
    }
    subtract(rank.data(), count_.data());  // the mask keeps ranks below twice the count
  }

  bool is_less(const std::uint64_t* a, const std::uint64_t* b) const {
    for (std::size_t i = limbs_; i-- > 0;) {
      if (a[i] != b[i]) return a[i] < b[i];
    }
    return false;
  }

  void add(std::uint64_t* a, const std::uint64_t* b) const {
    std::uint64_t carry = 0;
    for (std::size_t i = 0; i < limbs_; ++i) {
      const std::uint64_t sum = b[i] + carry;
      carry = static_cast<std::uint64_t>(sum < carry);
      a[i] += sum;
      carry += static_cast<std::uint64_t>(a[i] < sum);
    }
  }

  void subtract(std::uint64_t* a, const std::uint64_t* b) const {
    std::uint64_t borrow = 0;
    for (std::size_t i = 0; i < limbs_; ++i) {
      const std::uint64_t taken = b[i] + borrow;
      borrow = static_cast<std::uint64_t>(taken < borrow);
      borrow += static_cast<std::uint64_t>(a[i] < taken);
      a[i] -= taken;
    }
  }

  std::vector<std::int32_t> num_choices_;
  std::size_t max_choices_;
  std::vector<std::int32_t> bins_;  // [L, O]
  std::vector<CostBound> bounds_;
  std::size_t limbs_ = 1;
  std::vector<Band> bands_;  // [L + 1]
  Rank table_;
  Rank count_;
  std::size_t rank_words_ = 0;
  std::uint64_t rank_mask_ = 0;
};

}  // namespace fastshift

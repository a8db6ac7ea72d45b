// The evolutionary population: ask for architectures [P, L], tell their scores; the loop of SPOS
// (Guo et al., 2020), with bounded producers and an exactly uniform fill.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arch_set.hpp"
#include "rng.hpp"
#include "sampler.hpp"

namespace fastshift {

struct PopulationSettings {
  std::size_t population;
  std::size_t parents;
  std::size_t mutation;   // mutants asked for in a generation
  std::size_t crossover;  // children of two parents asked for in a generation
  double mutation_prob;   // of each gene
  std::size_t keep;
  bool seen_lasts;  // the seen-set spans the run; else it starts anew with each ask
  bool loss_first;  // order by loss, then error
};

struct Entry {
  std::vector<std::uint8_t> arch;
  double error;
  double loss;
  std::int64_t flops;
  std::int64_t version;     // of the weights that were scored
  std::int64_t generation;  // that proposed it
};

// How the last ask went.
struct AskReport {
  std::size_t parents = 0;
  std::size_t mutants = 0;
  std::size_t children = 0;
  std::size_t random = 0;
  std::size_t tries = 0;      // of all three producers
  bool is_exhausted = false;  // every feasible architecture is in the seen-set
};

struct PopulationState {
  Rng::State rng;
  std::int64_t generation = 0;
  std::uint64_t proposals = 0;
  std::uint64_t accepted = 0;
  std::vector<std::uint8_t> seen;  // [S, L], in the order they were met
  std::vector<Entry> kept;         // best first
};

class Population {
 public:
  // A producer gives up after this many tries for each architecture it owes.
  static constexpr std::size_t kTriesPerArch = 10;
  // Where random tries leave the fill short, sampled sets up to this size are listed instead.
  static constexpr std::uint64_t kMaxListed = 1U << 16;

  Population(std::shared_ptr<const Sampler> sampler, const PopulationSettings& settings,
             std::uint64_t seed)
      : sampler_(std::move(sampler)),
        settings_(settings),
        threshold_(static_cast<std::uint64_t>(std::ldexp(settings.mutation_prob, 53))),
        rng_(seed),
        seen_(sampler_->num_blocks()) {
    if (settings.population < 1) throw std::invalid_argument("population: at least 1 expected");
    if (settings.parents < 1 || settings.parents > settings.keep) {
      throw std::invalid_argument("parents: 1 to keep expected");
    }
    if (settings.mutation > settings.population ||
        settings.crossover > settings.population - settings.mutation) {
      throw std::invalid_argument("mutation, crossover: at most population together expected");
    }
    if (!(settings.mutation_prob >= 0.0 && settings.mutation_prob <= 1.0)) {
      throw std::invalid_argument("mutation_prob: 0 to 1 expected");
    }
  }

  std::size_t num_blocks() const { return sampler_->num_blocks(); }
  const Sampler& sampler() const { return *sampler_; }
  const std::vector<Entry>& kept() const { return kept_; }  // best first
  std::size_t num_parents() const { return std::min(settings_.parents, kept_.size()); }
  const AskReport& last_ask() const { return report_; }
  std::int64_t generation() const { return generation_; }  // told so far
  std::uint64_t proposals() const { return proposals_; }   // draws of the random fill
  std::uint64_t accepted() const { return accepted_; }     // feasible ones among them

  // The next generation, [P, L]: mutants, children, random; no two equal, none seen, all feasible.
  std::vector<std::uint8_t> ask() {
    report_ = AskReport{};
    report_.parents = num_parents();
    if (!settings_.seen_lasts) seen_.clear();
    std::vector<std::uint8_t> archs;
    archs.reserve(settings_.population * num_blocks());
    const std::vector<std::uint8_t> parents = parent_rows();
    if (!parents.empty()) {
      const auto num = static_cast<std::uint32_t>(num_parents());
      const auto pick = [&] { return parents.data() + rng_.below(num) * num_blocks(); };
      report_.mutants = produce(settings_.mutation, archs, [&](std::uint8_t* child) {
        mutate(pick(), child);
        return sampler_->is_feasible(child);
      });
      report_.children = produce(settings_.crossover, archs, [&](std::uint8_t* child) {
        const std::uint8_t* one = pick();
        cross(one, pick(), child);
        return sampler_->is_feasible(child);
      });
    }
    fill(archs);
    return archs;
  }

  // Scores of a generation, which they end. Where the seen-set spans the run the best so far are
  // kept; else weights move, and only the present parents stay beside the new.
  void tell(const std::uint8_t* archs, std::size_t num_archs, const double* errors,
            const double* losses, const std::int64_t* flops, std::int64_t version) {
    if (!settings_.seen_lasts) kept_.resize(num_parents());
    merge(archs, num_archs, errors, losses, flops, version,
          std::vector<std::int64_t>(num_archs, generation_));
    for (std::size_t i = 0; i < num_archs; ++i) seen_.insert(archs + i * num_blocks());
    ++generation_;
  }

  // New scores of kept architectures, which keep their generation. Where weights move, those
  // without a new score are dropped.
  void replace_scores(const std::uint8_t* archs, std::size_t num_archs, const double* errors,
                      const double* losses, const std::int64_t* flops, std::int64_t version) {
    ArchSet known(num_blocks());
    for (const Entry& entry : kept_) known.insert(entry.arch.data());
    std::vector<std::int64_t> generations;
    for (std::size_t i = 0; i < num_archs; ++i) {
      const std::size_t place = known.index_of(archs + i * num_blocks());
      if (place == known.size()) {
        throw std::invalid_argument("archs: kept architectures expected, row " + std::to_string(i) +
                                    " is not one");
      }
      generations.push_back(kept_[place].generation);
    }
    if (!settings_.seen_lasts) kept_.clear();
    merge(archs, num_archs, errors, losses, flops, version, generations);
  }

  PopulationState state() const {
    return {rng_.state(), generation_, proposals_, accepted_, seen_.rows(), kept_};
  }

  void set_state(const PopulationState& state) {
    const Rng rng(state.rng);
    ArchSet seen(num_blocks());
    const std::size_t num_seen = state.seen.size() / num_blocks();
    for (std::size_t i = 0; i < num_seen; ++i) seen.insert(state.seen.data() + i * num_blocks());
    rng_ = rng;
    seen_ = std::move(seen);
    kept_ = state.kept;
    generation_ = state.generation;
    proposals_ = state.proposals;
    accepted_ = state.accepted;
    report_ = AskReport{};
  }

 private:
  // Tries for `quota` feasible, unseen architectures; appends them and says how many there are.
  template <typename Make>
  std::size_t produce(std::size_t quota, std::vector<std::uint8_t>& archs, Make make) {
    std::vector<std::uint8_t> child(num_blocks());
    std::size_t made = 0;
    for (std::size_t i = 0; i < kTriesPerArch * quota && made < quota; ++i) {
      ++report_.tries;
      if (!make(child.data()) || !seen_.insert(child.data())) continue;
      archs.insert(archs.end(), child.begin(), child.end());
      ++made;
    }
    return made;
  }

  // Each gene is drawn anew, from all its choices, with the mutation's probability.
  void mutate(const std::uint8_t* parent, std::uint8_t* child) {
    const std::vector<std::int32_t>& num_choices = sampler_->num_choices();
    for (std::size_t block = 0; block < num_blocks(); ++block) {
      child[block] = rng_.chance(threshold_)
                         ? static_cast<std::uint8_t>(
                               rng_.below(static_cast<std::uint32_t>(num_choices[block])))
                         : parent[block];
    }
  }

  // Each gene comes from either parent with probability one half: one bit of a draw, lowest first.
  void cross(const std::uint8_t* one, const std::uint8_t* other, std::uint8_t* child) {
    std::uint64_t bits = 0;
    for (std::size_t block = 0; block < num_blocks(); ++block, bits >>= 1) {
      if (block % 64 == 0) bits = rng_.next();
      child[block] = (bits & 1) != 0 ? other[block] : one[block];
    }
  }

  void fill(std::vector<std::uint8_t>& archs) {
    std::size_t missing = settings_.population - archs.size() / num_blocks();
    Sampler::Rank rank;
    bool is_drawn = true;  // a draw that gives up is the last
    report_.random = produce(missing, archs, [&](std::uint8_t* child) {
      is_drawn = is_drawn && sampler_->draw(rng_, child, rank, proposals_);
      accepted_ += static_cast<std::uint64_t>(is_drawn);
      return is_drawn;
    });
    missing -= report_.random;
    if (missing == 0 || !sampler_->has_count_up_to(kMaxListed)) return;
    std::vector<std::uint8_t> unseen = list_unseen();
    std::size_t num_unseen = unseen.size() / num_blocks();
    for (; missing > 0 && num_unseen > 0; --missing) {
      const std::size_t i = rng_.below(static_cast<std::uint32_t>(num_unseen--));
      const auto chosen = unseen.begin() + static_cast<std::ptrdiff_t>(i * num_blocks());
      seen_.insert(&*chosen);
      archs.insert(archs.end(), chosen, chosen + static_cast<std::ptrdiff_t>(num_blocks()));
      std::copy(unseen.end() - static_cast<std::ptrdiff_t>(num_blocks()), unseen.end(), chosen);
      unseen.resize(num_unseen * num_blocks());
      ++report_.random;
    }
    report_.is_exhausted = missing > 0;
  }

  // Feasible architectures outside the seen-set, in lexicographic order.
  std::vector<std::uint8_t> list_unseen() const {
    std::vector<std::uint8_t> unseen, arch(num_blocks());
    Sampler::Rank rank;
    for (std::uint64_t i = 0; i < sampler_->count()[0]; ++i) {
      rank.assign(sampler_->limbs(), 0);
      rank[0] = i;
      sampler_->unrank(rank, arch.data());
      if (sampler_->is_feasible(arch.data()) && !seen_.contains(arch.data())) {
        unseen.insert(unseen.end(), arch.begin(), arch.end());
      }
    }
    return unseen;
  }

  std::vector<std::uint8_t> parent_rows() const {
    std::vector<std::uint8_t> rows;
    for (std::size_t i = 0; i < num_parents(); ++i) {
      rows.insert(rows.end(), kept_[i].arch.begin(), kept_[i].arch.end());
    }
    return rows;
  }

  // New scores displace old ones of the same architecture, the last row winning; a score that is
  // not a number takes its architecture out.
  void merge(const std::uint8_t* archs, std::size_t num_archs, const double* errors,
             const double* losses, const std::int64_t* flops, std::int64_t version,
             const std::vector<std::int64_t>& generations) {
    ArchSet told(num_blocks());
    std::vector<Entry> entries;
    for (std::size_t i = num_archs; i-- > 0;) {
      const std::uint8_t* arch = archs + i * num_blocks();
      if (!told.insert(arch)) continue;
      if (std::isnan(errors[i]) || (settings_.loss_first && std::isnan(losses[i]))) continue;
      entries.push_back({{arch, arch + num_blocks()}, errors[i], losses[i], flops[i], version,
                         generations[i]});
    }
    for (Entry& entry : kept_) {
      if (!told.contains(entry.arch.data())) entries.push_back(std::move(entry));
    }
    std::sort(entries.begin(), entries.end(),
              [this](const Entry& a, const Entry& b) { return is_better(a, b); });
    if (entries.size() > settings_.keep) entries.resize(settings_.keep);
    kept_ = std::move(entries);
  }

  // A total order: error, loss (or loss, error), flops, choices.
  bool is_better(const Entry& a, const Entry& b) const {
    const auto [a_first, a_second] = score_of(a);
    const auto [b_first, b_second] = score_of(b);
    if (a_first != b_first) return a_first < b_first;
    if (std::isnan(a_second) != std::isnan(b_second)) return std::isnan(b_second);
    if (!std::isnan(a_second) && a_second != b_second) return a_second < b_second;
    if (a.flops != b.flops) return a.flops < b.flops;
    return a.arch < b.arch;
  }

  std::pair<double, double> score_of(const Entry& entry) const {
    if (settings_.loss_first) return {entry.loss, entry.error};
    return {entry.error, entry.loss};
  }

  std::shared_ptr<const Sampler> sampler_;
  PopulationSettings settings_;
  std::uint64_t threshold_;
  Rng rng_;
  ArchSet seen_;
  std::vector<Entry> kept_;
  std::int64_t generation_ = 0;
  std::uint64_t proposals_ = 0;
  std::uint64_t accepted_ = 0;
  AskReport report_;
};

}  // namespace fastshift

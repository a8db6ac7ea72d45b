// The one generator: xoshiro256** (Blackman and Vigna, 2018), seeded by splitmix64.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>

namespace fastshift {

// A redraw succeeds with probability over 1/2, so this bound is met with probability below 2^-128.
constexpr int kMaxRedraws = 128;

class Rng {
 public:
  using State = std::array<std::uint64_t, 4>;

  explicit Rng(std::uint64_t seed) {
    for (std::uint64_t& word : state_) {
      seed += 0x9e3779b97f4a7c15U;
      std::uint64_t z = seed;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
      word = z ^ (z >> 31);
    }
  }

  explicit Rng(const State& state) : state_(state) {
    if (state == State{}) throw std::invalid_argument("rng: a state that is not all zero expected");
  }

  const State& state() const { return state_; }

  // 64 uniform bits.
  std::uint64_t next() {
    const std::uint64_t result = rotate(state_[1] * 5, 7) * 9;
    const std::uint64_t shifted = state_[1] << 17;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = rotate(state_[3], 45);
    return result;
  }

  // Uniform over 0 .. n - 1, n >= 1, without bias (Lemire, 2019).
  std::uint32_t below(std::uint32_t n) {
    std::uint64_t product = 0;
    for (int redraw = 0; redraw < kMaxRedraws; ++redraw) {
      product = (next() >> 32) * n;
      const auto low = static_cast<std::uint32_t>(product);
      if (low >= n || low >= (0U - n) % n) break;
    }
    return static_cast<std::uint32_t>(product >> 32);
  }

  // True with probability threshold / 2^53.
  bool chance(std::uint64_t threshold) { return (next() >> 11) < threshold; }

 private:
  static std::uint64_t rotate(std::uint64_t x, int bits) {
    return (x << bits) | (x >> (64 - bits));
  }

  State state_;
};

}  // namespace fastshift

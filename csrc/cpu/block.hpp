// One candidate op on the CPU: its chain of units in its frame, forward, backward and inference.
//
// The work is cut into groups of images that depend on the shapes alone, and sums over groups are
// merged in their order, so no result depends on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace fastshift::cpu {

struct Unit {
  bool depthwise;
  int64_t in_channels, out_channels;
  int kernel, stride;
  bool relu;
};

enum class Frame { plain, residual, shuffle };

struct Images {
  int64_t count, height, width;
  Element element;  // of every row
};

// Of one unit; gamma and beta null: 1 and 0.
struct Weights {
  const float *weight, *gamma, *beta;
  double eps;
};

struct Gradients {
  float *weight, *gamma, *beta;  // gamma and beta may be null
};

// Of one unit's batch norm: the statistics that inference normalises by.
struct Moments {
  const float *mean, *variance;
};

class PackedWeights;

class Block {
 public:
  // `units` holds the main chain, then the shortcut.
  Block(std::vector<Unit> units, int main_units, Frame frame, int64_t in_channels,
        int64_t out_channels);

  int64_t num_units() const { return static_cast<int64_t>(units_.size()); }

  // What a training pass keeps for its backward, in floats.
  int64_t saved_floats(const Images& images) const;
  // Of all units, one after the other: [5][out], the mean, unbiased variance, scale, shift, and one
  // over the standard deviation.
  int64_t statistics_floats() const;

  // `packed`: of this block and these weights, filled where it is not; null: packed for this call.

  // Each batch norm normalises by the moments of these images. `saved` null: no backward follows.
  void forward(const Kernels& kernels, const Images& images, const void* x,
               const std::vector<Weights>& weights, void* saved, float* statistics, void* y,
               int threads, PackedWeights* packed) const;
  // dx may be null. `add`: to the gradients that are there, which are overwritten otherwise.
  void backward(const Kernels& kernels, const Images& images, const void* x,
                const std::vector<Weights>& weights, const void* saved, const float* statistics,
                const void* dy, void* dx, const std::vector<Gradients>& gradients,
                bool add, int threads, PackedWeights* packed) const;
  // `pooled`: y is [images][out] in float32, the means over the positions; the last unit is not depthwise.
  void infer(const Kernels& kernels, const Images& images, const void* x,
             const std::vector<Weights>& weights, const std::vector<Moments>& moments, void* y,
             bool pooled, int threads, PackedWeights* packed) const;
  // Lines of its first unit's outputs that inference makes at a time, of the main chain and of the
  // shortcut's: all of them unless the images are large.
  std::vector<int64_t> inference_lines(const Images& images) const;

 private:
  class Pass;  // backward
  struct Tiling;  // inference
  Tiling tiling(const Images& images, bool pooled) const;
  struct Chain {
    int first, stop;
    int64_t x_offset, x_step, y_offset;
  };
  // Where the arrays of a unit lie.
  struct Place {
    int64_t saved, statistics;
  };
  std::vector<Place> places(const Images& images) const;
  Chain main_chain() const;
  Chain shortcut_chain() const;

  std::vector<Unit> units_;
  int main_units_;
  Frame frame_;
  int64_t in_channels_, out_channels_;
};

}  // namespace fastshift::cpu

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
};

// Of one unit; gamma and beta null: 1 and 0.
struct Weights {
  const float *weight, *gamma, *beta;
  double eps;
};

// Of one unit: the raw output [rows][out], and [5][out]: mean, unbiased variance, scale, shift, and
// one over the standard deviation.
struct Saved {
  float *raw, *statistics;
};

struct Gradients {
  float *weight, *gamma, *beta;  // overwritten; gamma and beta may be null
};

// Of one unit's batch norm: the statistics that inference normalises by.
struct Moments {
  const float *mean, *variance;
};

class Block {
 public:
  // `units` holds the main chain, then the shortcut.
  Block(std::vector<Unit> units, int main_units, Frame frame, int64_t in_channels,
        int64_t out_channels);

  int64_t num_units() const { return static_cast<int64_t>(units_.size()); }
  const std::vector<Unit>& units() const { return units_; }

  // Each batch norm normalises by the moments of these images.
  void forward(const Kernels& kernels, const Images& images, const float* x,
               const std::vector<Weights>& weights, const std::vector<Saved>& saved, float* y,
               int threads) const;
  // dx may be null. `work`: two buffers of the largest raw output.
  void backward(const Kernels& kernels, const Images& images, const float* x,
                const std::vector<Weights>& weights, const std::vector<Saved>& saved,
                const float* dy, float* dx, const std::vector<Gradients>& gradients,
                float* const work[2], int threads) const;
  // `pooled`: y is [images][out], the means over the positions; the last unit is not depthwise.
  void infer(const Kernels& kernels, const Images& images, const float* x,
             const std::vector<Weights>& weights, const std::vector<Moments>& moments, float* y,
             bool pooled, int threads) const;

 private:
  struct Chain {
    int first, stop;
    int64_t x_offset, x_step, y_offset;
  };
  Chain main_chain() const;
  Chain shortcut_chain() const;

  std::vector<Unit> units_;
  int main_units_;
  Frame frame_;
  int64_t in_channels_, out_channels_;
};

}  // namespace fastshift::cpu

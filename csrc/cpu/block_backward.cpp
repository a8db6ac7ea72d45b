#include <algorithm>
#include <stdexcept>
#include <utility>

#include "packed.hpp"
#include "parts.hpp"

namespace fastshift::cpu {
namespace {

// Sums of groups, `size` values each, into the first, in order.
void merge(const Kernels& kernels, float* partial, int groups, int64_t size, int threads) {
  constexpr int64_t kSlice = 8 * 1024;
  parallel(static_cast<int>((size + kSlice - 1) / kSlice), threads, [&](int slice) {
    float* to = partial + slice * kSlice;
    const int64_t count = std::min(kSlice, size - slice * kSlice);
    for (int group = 1; group < groups; ++group) kernels.add(to + group * size, count, to);
  });
}

// `kernels.outer` in slices of whole tiles of its rows.
void outer(const Kernels& kernels, int64_t rows, int64_t m, int64_t n, const float* left,
           int64_t left_row, const float* right, int64_t right_row, float* to, int64_t to_row,
           int threads) {
  constexpr int64_t kTiles = 48;
  const int64_t slice = ((m + threads - 1) / threads + kTiles - 1) / kTiles * kTiles;
  parallel(static_cast<int>((m + slice - 1) / slice), threads, [&](int index) {
    const int64_t first = index * slice;
    kernels.outer(rows, std::min(slice, m - first), n, left + first, left_row, right, right_row,
                  to + first * to_row, to_row);
  });
}

std::vector<double> merged(const double* sums, int groups, int64_t size) {
  std::vector<double> total(size, 0.0);
  for (int group = 0; group < groups; ++group) {
    for (int64_t i = 0; i < size; ++i) total[i] += sums[group * size + i];
  }
  return total;
}

template <class T>
T* zeros(Role role, int64_t count) {
  T* found = scratch_memory<T>(role, count);
  std::fill(found, found + count, T{0});
  return found;
}

// A gradient's value; `add`: one more term of it, rounded before it is added.
inline void put(float* to, float value, bool add) { *to = add ? *to + value : value; }

// The kernels keep the channels innermost, PyTorch the taps.
void write_weight_gradient(const Kernels& kernels, const Unit& unit, const float* from, float* to,
                           bool add) {
  const int64_t size = weight_size(unit), in = unit.in_channels;
  const int64_t taps = int64_t{unit.kernel} * unit.kernel, owners = size / (in * taps);
  if (taps == 1) {
    if (add) {
      kernels.add(from, size, to);
    } else {
      std::copy(from, from + size, to);
    }
    return;
  }
  for (int64_t o = 0; o < owners; ++o) {
    for (int64_t c = 0; c < in; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        put(to + (o * in + c) * taps + tap, from[(o * taps + tap) * in + c], add);
      }
    }
  }
}

// Whether a pointwise unit's gradients are computed along with those of the depthwise unit behind
// it: where it widens enough that its hidden rows are what costs, and positions are many enough
// that products of its weights alone do not.
bool goes_along(const Unit& before, const Unit& unit, const Geometry& geometry, int64_t images) {
  const int64_t in = before.in_channels;
  return unit.depthwise && !before.depthwise && before.kernel == 1 && before.stride == 1 &&
         before.out_channels >= 2 * in && images * geometry.height * geometry.width >= 8 * in;
}

}  // namespace

// One chain of a block, from its last unit to its first.
class Block::Pass {
 public:
  Pass(const Block& block, const Kernels& kernels, const Images& images, const void* x,
       const std::vector<Weights>& weights, const void* saved, const float* statistics,
       const void* dy, void* dx, const std::vector<Gradients>& gradients, bool add, int threads,
       PackedWeights& packed)
      : block_(block),
        units_(block.units_),
        kernels_(kernels),
        images_(images),
        element_(images.element),
        x_(x),
        weights_(weights),
        saved_(saved),
        statistics_(statistics),
        dy_(dy),
        dx_(dx),
        gradients_(gradients),
        add_(add),
        threads_(threads),
        packed_(packed),
        place_(block.places(images)) {}

  void run(const Chain& chain, Source add) {
    geometry_.resize(units_.size());
    int64_t height = images_.height, width = images_.width;
    for (int index = chain.first; index < chain.stop; ++index) {
      geometry_[index] = geometry_of(units_[index], height, width);
      height = geometry_[index].out_height;
      width = geometry_[index].out_width;
    }
    gradient_ = {after(dy_, chain.y_offset, element_), block_.out_channels_, 1};
    sum_last(chain.stop - 1);
    for (int index = chain.stop - 1; index >= chain.first; --index) {
      finish_norm(index);
      if (index > chain.first &&
          goes_along(units_[index - 1], units_[index], geometry_[index], images_.count)) {
        two_units(chain, index, add);
        --index;
      } else {
        one_unit(chain, index, add);
      }
    }
  }

 private:
  const float* statistics(int index) const { return statistics_ + place_[index].statistics; }
  Source raw(int index) const {
    return {after(saved_, place_[index].saved, element_), units_[index].out_channels, 1};
  }
  // Weights for the gradient of what a unit reads.
  const float* packed(int index) {
    return packed_.get(kernels_, units_[index], index, weights_[index].weight, false, element_);
  }
  int64_t positions(int index) const {
    return geometry_[index].out_height * geometry_[index].out_width;
  }

  // Where the rows of the gradient of a unit's input go that are not the chain's own.
  void* hidden_gradient(int64_t channels, const Geometry& shape) {
    Work& work = work_[turn_ ^= 1];
    work.reset(images_.count * shape.height * shape.width * channels * size_of(element_));
    return work.data();
  }

  // Sums over the gradient of what the last unit's norm and activation gave.
  void sum_last(int index) {
    const int64_t out = units_[index].out_channels, rows = positions(index);
    const int groups = group_count(units_[index], images_);
    double* sums = zeros<double>(kSums, groups * 2 * out);
    parallel(groups, threads_, [&](int group) {
      kernels_.reduce[element_]({group_start(group, groups, images_.count) * rows,
                                 group_start(group + 1, groups, images_.count) * rows, out,
                                 raw(index), gradient_, affine_of(units_[index], statistics(index)),
                                 statistics(index), sums + group * 2 * out});
    });
    totals_ = merged(sums, groups, 2 * out);
  }

  // From the sums, what batch norm's backward needs, and the gradients of its scale and shift.
  void finish_norm(int index) {
    const int64_t out = units_[index].out_channels;
    const float* own = statistics(index);
    const double count = static_cast<double>(images_.count * positions(index));
    slope_.resize(out);
    offset_.resize(out);
    for (int64_t c = 0; c < out; ++c) {
      const double inverse = own[4 * out + c], scale = own[2 * out + c];
      const double correlation = totals_[out + c] * inverse;
      slope_[c] = static_cast<float>(-scale * inverse * correlation / count);
      offset_[c] = static_cast<float>(-scale * totals_[c] / count);
      const Gradients& to = gradients_[index];
      if (to.gamma) put(to.gamma + c, static_cast<float>(correlation), add_);
      if (to.beta) put(to.beta + c, static_cast<float>(totals_[c]), add_);
    }
  }

  // What a unit reads.
  void set_input(const Chain& chain, int index, Source& x, Affine& prologue,
                 const float*& x_mean) const {
    if (index == chain.first) {
      x = {after(x_, chain.x_offset, element_), block_.in_channels_, chain.x_step};
      return;
    }
    x = raw(index - 1);
    prologue = affine_of(units_[index - 1], statistics(index - 1));
    x_mean = statistics(index - 1);
  }

  // All that the groups have in common but where the gradient of x goes.
  Backward task_of(const Chain& chain, int index) const {
    Backward task{};
    const int64_t out = units_[index].out_channels;
    const float* own = statistics(index);
    task.geometry = geometry_[index];
    task.raw = raw(index);
    task.gradient = gradient_;
    task.activation = affine_of(units_[index], own);
    task.norm = {own, own + 2 * out, slope_.data(), offset_.data()};
    set_input(chain, index, task.x, task.prologue, task.x_mean);
    return task;
  }

  // What a unit's gradient of x brings: sums for the norm before, or, of the first, one more term.
  void set_target(const Chain& chain, int index, Source add, Backward& task, double* sums) {
    if (index > chain.first) {
      task.sums = sums;
    } else {
      task.add = add;
    }
  }

  Target target_of(const Chain& chain, int index) {
    if (index > chain.first) {
      const int64_t in = units_[index].in_channels;
      return {hidden_gradient(in, geometry_[index]), in, 1};
    }
    if (!dx_) return {nullptr, 0, 1};
    return {after(dx_, chain.x_offset, element_), block_.in_channels_, chain.x_step};
  }

  void one_unit(const Chain& chain, int index, Source add) {
    const Unit& unit = units_[index];
    const int64_t in = unit.in_channels, size = weight_size(unit);
    const int groups = group_count(unit, images_, geometry_[index]);
    float* partial = scratch_memory<float>(kPartial, groups * size);
    double* sums = zeros<double>(kSums, groups * 2 * in);
    const int64_t scratch = kernels_.scratch(geometry_[index], unit.depthwise);
    Backward common = task_of(chain, index);
    common.weight = packed(index);
    common.dx = target_of(chain, index);
    parallel(groups, threads_, [&](int group) {
      Backward task = common;
      task.first_image = group_start(group, groups, images_.count);
      task.stop_image = group_start(group + 1, groups, images_.count);
      set_target(chain, index, add, task, sums + group * 2 * in);
      task.dweight = partial + group * size;
      float* memory = scratch_memory<float>(kScratch, scratch);
      (unit.depthwise ? kernels_.depthwise_backward : kernels_.product_backward)[element_](task,
                                                                                          memory);
    });
    merge(kernels_, partial, groups, size, threads_);
    write_weight_gradient(kernels_, unit, partial, gradients_[index].weight, add_);
    totals_ = merged(sums, groups, 2 * in);
    gradient_ = {common.dx.data, in, 1};
  }

  // A depthwise unit and the pointwise one before it, in one reading of the hidden rows between.
  void two_units(const Chain& chain, int index, Source add) {
    const Unit &unit = units_[index], &before = units_[index - 1];
    const int64_t in = before.in_channels, hidden = before.out_channels;
    const int64_t size = weight_size(unit), size_before = weight_size(before);
    const Geometry& shape = geometry_[index - 1];
    const int64_t rows = shape.height * shape.width;
    const int groups = std::min(group_count(unit, images_, geometry_[index]),
                                group_count(before, images_, shape));
    const bool wanted = index - 1 > chain.first || dx_;
    float* partial = scratch_memory<float>(kPartial, groups * (size + size_before + in * in));
    float* partial_before = partial + groups * size;
    float* squares = partial_before + groups * size_before;
    double* sums = zeros<double>(kSums, groups * (2 * hidden + in));
    double* centre_sums = sums + groups * 2 * hidden;
    Work partial_dx(wanted ? images_.count * rows * in * 4 : 1);
    Expanding along{};
    along.geometry = shape;
    const float* unused = nullptr;
    set_input(chain, index - 1, along.x, along.prologue, unused);
    std::vector<float> centre(in);
    kernels_.centre[element_](shape, along.x, along.prologue, centre.data());
    along.centre = centre.data();
    along.weight = packed(index - 1);
    along.gain = statistics(index - 1) + 2 * hidden;
    along.dx = wanted ? static_cast<float*>(partial_dx.data()) : nullptr;
    const int64_t scratch = kernels_.expanding_scratch(geometry_[index], shape);
    Backward common = task_of(chain, index);
    common.weight = packed(index);
    parallel(groups, threads_, [&](int group) {
      Expanding own = along;
      own.dweight = partial_before + group * size_before;
      own.squares = squares + group * in * in;
      own.sums = centre_sums + group * in;
      Backward task = common;
      task.before = &own;
      task.first_image = group_start(group, groups, images_.count);
      task.stop_image = group_start(group + 1, groups, images_.count);
      task.sums = sums + group * 2 * hidden;
      task.dweight = partial + group * size;
      kernels_.depthwise_backward[element_](task, scratch_memory<float>(kScratch, scratch));
    });
    merge(kernels_, partial, groups, size, threads_);
    merge(kernels_, partial_before, groups, size_before, threads_);
    merge(kernels_, squares, groups, in * in, threads_);
    write_weight_gradient(kernels_, unit, partial, gradients_[index].weight, add_);
    totals_ = merged(sums, groups, 2 * hidden);
    const std::vector<double> centred = merged(centre_sums, groups, in);
    finish_norm(index - 1);
    finish_weight(index - 1, partial_before, squares, centred);
    gradient_ = {nullptr, in, 1};
    if (wanted) correct(chain, index - 1, add, centre, centred, along.dx);
  }

  // The weights' gradient from the sums of gain * g times the centred input: batch norm's backward
  // is gain * g + slope * (raw - mean) + offset, and raw is the weights times the input.
  void finish_weight(int index, const float* partial, float* squares,
                     const std::vector<double>& centred) {
    const Unit& unit = units_[index];
    const int64_t in = unit.in_channels, out = unit.out_channels;
    const double share = 1.0 / static_cast<double>(images_.count * positions(index));
    for (int64_t a = 0; a < in; ++a) {
      for (int64_t b = 0; b < in; ++b) {
        squares[a * in + b] -= static_cast<float>(centred[a] * centred[b] * share);
      }
    }
    const float* weight = weights_[index].weight;
    std::vector<float> columns(in * out), along(in * out);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t c = 0; c < in; ++c) columns[c * out + o] = weight[o * in + c];
    }
    outer(kernels_, in, out, in, columns.data(), out, squares, in, along.data(), in, threads_);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t c = 0; c < in; ++c) {
        const int64_t at = o * in + c;
        put(gradients_[index].weight + at,
            static_cast<float>(partial[at] + slope_[o] * static_cast<double>(along[at]) +
                               offset_[o] * centred[c]),
            add_);
      }
    }
  }

  // What slope and offset add to the gradient of x: a product with a matrix of its own channels.
  void correct(const Chain& chain, int index, Source add, const std::vector<float>& centre,
               const std::vector<double>& centred, const float* partial) {
    const Unit& unit = units_[index];
    const int64_t in = unit.in_channels, out = unit.out_channels;
    const double share = 1.0 / static_cast<double>(images_.count * positions(index));
    const float* weight = weights_[index].weight;
    std::vector<float> sloped(in * out), matrix(in * in), constant(in);
    std::vector<double> moved(in, 0.0);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t c = 0; c < in; ++c) {
        sloped[o * in + c] = slope_[o] * weight[o * in + c];
        moved[c] += static_cast<double>(offset_[o]) * weight[o * in + c];
      }
    }
    outer(kernels_, out, in, in, sloped.data(), in, weight, in, matrix.data(), in, threads_);
    for (int64_t c = 0; c < in; ++c) {
      for (int64_t k = 0; k < in; ++k) moved[c] -= matrix[c * in + k] * centred[k] * share;
      constant[c] = static_cast<float>(moved[c]);
    }
    const Unit square{false, in, in, 1, 1, false};
    Backward common{};
    common.geometry = geometry_of(square, geometry_[index].height, geometry_[index].width);
    const int groups = group_count(square, images_);
    common.weight = packed_weight(kernels_, square, matrix.data(), true, element_);
    common.centre = centre.data();
    common.constant = constant.data();
    common.partial = partial;
    set_input(chain, index, common.x, common.prologue, common.x_mean);
    common.dx = target_of(chain, index);
    double* sums = zeros<double>(kSums, groups * 2 * in);
    const int64_t scratch = kernels_.scratch(common.geometry, false);
    parallel(groups, threads_, [&](int group) {
      Backward task = common;
      task.first_image = group_start(group, groups, images_.count);
      task.stop_image = group_start(group + 1, groups, images_.count);
      set_target(chain, index, add, task, sums + group * 2 * in);
      kernels_.correct[element_](task, scratch_memory<float>(kScratch, scratch));
    });
    totals_ = merged(sums, groups, 2 * in);
    gradient_ = {common.dx.data, in, 1};
  }

  const Block& block_;
  const std::vector<Unit>& units_;
  const Kernels& kernels_;
  const Images& images_;
  const Element element_;
  const void* const x_;
  const std::vector<Weights>& weights_;
  const void* const saved_;
  const float* const statistics_;
  const void* const dy_;
  void* const dx_;
  const std::vector<Gradients>& gradients_;
  const bool add_;
  const int threads_;
  PackedWeights& packed_;
  const std::vector<Place> place_;
  std::vector<Geometry> geometry_;
  Work work_[2];
  int turn_ = 0;
  Source gradient_{};            // of what the unit's norm and activation gave
  std::vector<double> totals_;   // [2][channels]: of that gradient, and of it times (raw - mean)
  std::vector<float> slope_, offset_;
};

void Block::backward(const Kernels& kernels, const Images& images, const void* x,
                     const std::vector<Weights>& weights, const void* saved,
                     const float* statistics, const void* dy, void* dx,
                     const std::vector<Gradients>& gradients, bool add, int threads,
                     PackedWeights* packed) const {
  if (images.count == 0) throw std::invalid_argument("images: none to train on");
  PackedWeights own_packed(*this);
  Pass pass(*this, kernels, images, x, weights, saved, statistics, dy, dx, gradients, add, threads,
            packed ? *packed : own_packed);
  Source term{nullptr, 0, 1};
  if (num_units() > main_units_) {
    pass.run(shortcut_chain(), term);
    if (dx) term = {dx, in_channels_, 1};
  } else if (dx && frame_ == Frame::residual) {
    term = {dy, out_channels_, 1};
  } else if (dx && frame_ == Frame::shuffle) {
    parallel_rows(images.count, images.height * images.width, threads,
                  [&](int64_t first, int64_t stop) {
                    kernels.apply[images.element](
                        {first, stop, in_channels_ / 2, {dy, out_channels_, 1},
                         {nullptr, nullptr, false}, {nullptr, 0, 1}, {dx, in_channels_, 2}});
                  });
  }
  pass.run(main_chain(), term);
}

}  // namespace fastshift::cpu

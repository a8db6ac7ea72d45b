#include "block.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "packed.hpp"
#include "parts.hpp"

namespace fastshift::cpu {
namespace {

// Group moments, merged in order (Chan, Golub and LeVeque 1979), to a unit's statistics.
void finish_statistics(const double* sums, int groups, const std::vector<int64_t>& counts,
                       int64_t channels, const Weights& weights, float* statistics) {
  double* mean = scratch_memory<double>(kMoments, 2 * channels);
  double* squares = mean + channels;
  std::fill(mean, mean + 2 * channels, 0.0);
  double count = 0.0;
  for (int group = 0; group < groups; ++group) {
    const double* own = sums + group * 3 * channels;
    const double n = static_cast<double>(counts[group]), total = count + n;
    const double per = 1.0 / n, share = n / total, between = count * n / total;
    for (int64_t c = 0; c < channels; ++c) {
      const double sum = own[channels + c], square = own[2 * channels + c];
      const double inside = square - sum * sum * per;
      const double delta = own[c] + sum * per - mean[c];
      squares[c] += (inside < 0.0 ? 0.0 : inside) + delta * delta * between;
      mean[c] += delta * share;
    }
    count = total;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double variance = squares[c] / count;
    const double inverse = 1.0 / std::sqrt(variance + weights.eps);
    const double scale = (weights.gamma ? weights.gamma[c] : 1.0) * inverse;
    statistics[c] = static_cast<float>(mean[c]);
    statistics[channels + c] = static_cast<float>(squares[c] / (count - 1.0));
    statistics[2 * channels + c] = static_cast<float>(scale);
    statistics[3 * channels + c] =
        static_cast<float>((weights.beta ? weights.beta[c] : 0.0) - mean[c] * scale);
    statistics[4 * channels + c] = static_cast<float>(inverse);
  }
}

// Stride of units one after the other, each of which takes what the one before gives; 0: it does not.
int64_t stride_of(const Unit* first, const Unit* last) {
  int64_t stride = 1;
  for (const Unit* unit = first; unit != last; ++unit) {
    if (unit != first && unit->in_channels != unit[-1].out_channels) return 0;
    stride *= unit->stride;
  }
  return stride;
}

// Whether the rows of a frame have the sizes that its two paths give.
bool fit(const std::vector<Unit>& units, int main_units, Frame frame, int64_t in, int64_t out) {
  const Unit *main = units.data(), *aside = main + main_units, *end = main + units.size();
  const int64_t stride = stride_of(main, aside), first = main->in_channels;
  const int64_t last = aside[-1].out_channels;
  if (stride == 0) return false;
  if (aside == end) {
    switch (frame) {
      case Frame::plain: return in == first && out == last;
      case Frame::residual: return in == first && out == last && in == out && stride == 1;
      case Frame::shuffle: return in == 2 * first && out == first + last && stride == 1;
    }
  }
  const int64_t beside = end[-1].out_channels;
  if (stride_of(aside, end) != stride || aside->in_channels != first || in != first) return false;
  return frame == Frame::residual ? out == last && out == beside
                                  : frame == Frame::shuffle && out == last + beside;
}

}  // namespace

Block::Block(std::vector<Unit> units, int main_units, Frame frame, int64_t in_channels,
             int64_t out_channels)
    : units_(std::move(units)),
      main_units_(main_units),
      frame_(frame),
      in_channels_(in_channels),
      out_channels_(out_channels) {
  if (main_units_ < 1 || main_units_ > num_units()) throw std::invalid_argument("units: none");
  for (const Unit& unit : units_) {
    const bool known = unit.depthwise
                           ? (unit.kernel == 3 || unit.kernel == 5 || unit.kernel == 7) &&
                                 (unit.stride == 1 || unit.stride == 2)
                           : unit.kernel % 2 == 1 && unit.stride >= 1;
    if (!known) throw std::invalid_argument("units: a kernel or stride that is not built in");
    if (unit.in_channels < 1 || unit.out_channels < 1 ||
        (unit.depthwise && unit.in_channels != unit.out_channels)) {
      throw std::invalid_argument("units: numbers of channels that no convolution has");
    }
  }
  if (!fit(units_, main_units_, frame_, in_channels_, out_channels_)) {
    throw std::invalid_argument("units: they do not follow each other in the frame");
  }
}

std::vector<Block::Place> Block::places(const Images& images) const {
  std::vector<Place> found(num_units() + 1, Place{0, 0});
  int64_t height = images.height, width = images.width;
  for (int64_t index = 0; index < num_units(); ++index) {
    const Unit& unit = units_[index];
    if (index == main_units_) {
      height = images.height;
      width = images.width;
    }
    const Geometry g = geometry_of(unit, height, width);
    height = g.out_height;
    width = g.out_width;
    const int64_t elements = images.count * height * width * unit.out_channels;
    found[index + 1] = {found[index].saved + (elements + 31) / 32 * 32,
                        found[index].statistics + 5 * unit.out_channels};
  }
  return found;
}

int64_t Block::saved_floats(const Images& images) const {
  return places(images).back().saved * size_of(images.element) / 4;
}

int64_t Block::statistics_floats() const { return places({0, 1, 1, kFloat32}).back().statistics; }

Block::Chain Block::main_chain() const {
  const bool splits = frame_ == Frame::shuffle && main_units_ == num_units();
  Chain chain{0, main_units_, splits ? 1 : 0, splits ? 2 : 1, 0};
  if (frame_ == Frame::shuffle) chain.y_offset = out_channels_ - units_[main_units_ - 1].out_channels;
  return chain;
}

Block::Chain Block::shortcut_chain() const {
  return {main_units_, static_cast<int>(num_units()), 0, 1, 0};
}

void Block::forward(const Kernels& kernels, const Images& images, const void* x,
                    const std::vector<Weights>& weights, void* saved, float* statistics,
                    void* y, int threads, PackedWeights* packed) const {
  if (images.count == 0) throw std::invalid_argument("images: none to train on");
  PackedWeights own_packed(*this);
  if (!packed) packed = &own_packed;
  const Element element = images.element;
  const std::vector<Place> place = places(images);
  // Where nothing is kept, a unit's rows are let go when the next has read them.
  Work work[2];
  const auto run = [&](const Chain& chain, Source residual) {
    Source source{after(x, chain.x_offset, element), in_channels_, chain.x_step};
    Affine prologue{nullptr, nullptr, false};
    int64_t height = images.height, width = images.width;
    for (int index = chain.first; index < chain.stop; ++index) {
      const Unit& unit = units_[index];
      const Geometry geometry = geometry_of(unit, height, width);
      height = geometry.out_height;
      width = geometry.out_width;
      if (images.count * height * width < 2) {
        throw std::invalid_argument("images: a batch norm expected more than 1 value per channel");
      }
      const int groups = group_count(unit, images);
      const int64_t channels = unit.out_channels;
      if (!saved) {
        work[index % 2].reset((place[index + 1].saved - place[index].saved) * size_of(element));
      }
      void* raw = saved ? after(saved, place[index].saved, element) : work[index % 2].data();
      const float* weight =
          packed->get(kernels, unit, index, weights[index].weight, true, element);
      double* sums = scratch_memory<double>(kSums, groups * 3 * channels);
      std::fill(sums, sums + groups * 3 * channels, 0.0);
      std::vector<int64_t> counts(groups);
      const int64_t scratch = kernels.scratch(geometry, unit.depthwise);
      parallel(groups, threads, [&](int group) {
        Forward task{};
        task.geometry = geometry;
        task.first_image = group_start(group, groups, images.count);
        task.stop_image = group_start(group + 1, groups, images.count);
        task.stop_line = height;
        task.x_lines = geometry.height;
        task.x = source;
        task.prologue = prologue;
        task.weight = weight;
        task.y = {raw, channels, 1};
        task.sums = sums + group * 3 * channels;
        counts[group] = (task.stop_image - task.first_image) * height * width;
        float* memory = scratch_memory<float>(kScratch, scratch);
        (unit.depthwise ? kernels.depthwise_forward : kernels.product_forward)[element](task, memory);
      });
      float* own = statistics + place[index].statistics;
      finish_statistics(sums, groups, counts, channels, weights[index], own);
      source = {raw, channels, 1};
      prologue = affine_of(unit, own);
    }
    parallel_rows(images.count, height * width, threads, [&](int64_t first, int64_t stop) {
      kernels.apply[element]({first, stop, units_[chain.stop - 1].out_channels, source, prologue, residual,
                     {after(y, chain.y_offset, element), out_channels_, 1}});
    });
  };
  Source residual{nullptr, 0, 1};
  if (num_units() > main_units_) {
    run(shortcut_chain(), residual);
    if (frame_ == Frame::residual) residual = {y, out_channels_, 1};
  } else if (frame_ == Frame::residual) {
    residual = {x, in_channels_, 1};
  } else if (frame_ == Frame::shuffle) {
    parallel_rows(images.count, images.height * images.width, threads,
                  [&](int64_t first, int64_t stop) {
                    kernels.apply[element]({first, stop, in_channels_ / 2, {x, in_channels_, 2},
                                   {nullptr, nullptr, false}, {nullptr, 0, 1},
                                   {y, out_channels_, 1}});
                  });
  }
  run(main_chain(), residual);
}

}  // namespace fastshift::cpu

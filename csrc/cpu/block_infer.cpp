// A block with fixed statistics: some images at a time, or some lines of one, through all its
// units, so that hidden rows stay in cache from unit to unit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "block.hpp"
#include "packed.hpp"
#include "parts.hpp"

namespace fastshift::cpu {
namespace {

// Hidden rows that are held at a time, within the second-level cache; and positions that a product
// still runs well with.
constexpr int64_t kTileBytes = 384 * 1024, kTilePositions = 96;

// Batch norm by fixed statistics as scale * x + shift.
void fold(const Weights& weights, const Moments& moments, int64_t channels, float* scale,
          float* shift) {
  for (int64_t c = 0; c < channels; ++c) {
    const double by = (weights.gamma ? weights.gamma[c] : 1.0) /
                      std::sqrt(static_cast<double>(moments.variance[c]) + weights.eps);
    scale[c] = static_cast<float>(by);
    shift[c] = static_cast<float>((weights.beta ? weights.beta[c] : 0.0) - moments.mean[c] * by);
  }
}

// Lines of outputs that the first `there` lines of the input are enough for.
int64_t lines_from(const Geometry& g, int64_t there) {
  if (there == g.height) return g.out_height;
  const int64_t last = there - 1 - g.kernel / 2;
  return last < 0 ? 0 : last / g.stride + 1;
}

// The units of a chain in flight: `step` lines of the first one's outputs, then what each next unit
// can make of all that is there, until the last has made its last line.
class Flow {
 public:
  Flow(const Geometry* geometry, int first, int stop, int64_t step, Element element)
      : geometry_(geometry), first_(first), stop_(stop), step_(step), room_(stop, 0), place_(stop) {
    each([&](int i, int64_t from, int64_t to, const std::vector<int64_t>& made) {
      if (stays(i)) {
        const Geometry& next = geometry_[i + 1];
        from = std::max<int64_t>(0, made[i + 1] * next.stride - next.kernel / 2);
      }
      room_[i] = std::max(room_[i], to - from);
    });
    // What does not stay lies in two buffers that units use in turn.
    const int64_t line = 64 / size_of(element);
    int64_t shared[2] = {0, 0};
    const auto size = [&](int i) {
      const Geometry& g = geometry_[i];
      return (room_[i] * g.out_width * g.out_channels + line - 1) / line * line;
    };
    for (int i = first_; i + 1 < stop_; ++i) {
      if (!stays(i)) shared[i % 2] = std::max(shared[i % 2], size(i));
    }
    elements_ = shared[0] + shared[1];
    for (int i = first_; i + 1 < stop_; ++i) {
      place_[i] = stays(i) ? elements_ : i % 2 * shared[0];
      if (stays(i)) elements_ += size(i);
    }
  }

  // Calls use(unit, from, to, lines that each unit had made before).
  template <class Use>
  void each(const Use& use) const {
    std::vector<int64_t> made(stop_, 0);
    while (made[stop_ - 1] < geometry_[stop_ - 1].out_height) {
      int64_t to = std::min(made[first_] + step_, geometry_[first_].out_height);
      for (int i = first_; i < stop_; ++i) {
        if (i > first_) to = lines_from(geometry_[i], to);
        if (to > made[i]) use(i, made[i], to, made);
        made[i] = to;
      }
    }
  }

  int64_t step() const { return step_; }
  bool whole() const { return step_ >= geometry_[first_].out_height; }
  // Whether the next unit reads lines of unit i again, after others are made: they are a ring.
  bool stays(int i) const { return !whole() && i + 1 < stop_ && geometry_[i + 1].kernel > 1; }
  int64_t room(int i) const { return room_[i]; }    // lines of unit i's outputs that are held
  int64_t place(int i) const { return place_[i]; }  // of an image's, where the first of them lies
  int64_t elements() const { return elements_; }    // of an image, of all units together

 private:
  const Geometry* geometry_;
  int first_, stop_;
  int64_t step_, elements_;
  std::vector<int64_t> room_, place_;
};

// An address that need not lie within what is pointed into.
template <class T>
T* moved(T* from, int64_t elements, Element element) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(from) + elements * size_of(element));
}

}  // namespace

// How a size of images is gone through.
struct Block::Tiling {
  std::vector<Geometry> geometry;  // of each unit
  std::vector<Flow> flows;         // of the main chain and the shortcut's
  bool splits;   // half of a row is passed on, while the lines that are read are in cache anyway
  bool whole;    // all lines of an image at a time
  int64_t hidden, held;  // elements of an image's hidden rows, and of all that a tile works on
};

Block::Tiling Block::tiling(const Images& images, bool pooled) const {
  Tiling found{std::vector<Geometry>(num_units()), {}, false, true, 0, 1};
  found.splits = frame_ == Frame::shuffle && num_units() == main_units_;
  const int64_t read = found.splits ? images.width * in_channels_ : 0;  // a line
  for (const Chain& chain : {main_chain(), shortcut_chain()}) {
    int64_t height = images.height, width = images.width;
    bool cuts = !pooled;
    for (int i = chain.first; i < chain.stop; ++i) {
      const Unit& unit = units_[i];
      found.geometry[i] = geometry_of(unit, height, width);
      height = found.geometry[i].out_height;
      width = found.geometry[i].out_width;
      const bool in_lines = unit.depthwise || (unit.kernel == 1 && unit.stride == 1);
      cuts = cuts && (i == chain.first || in_lines);
    }
    if (chain.first == chain.stop) continue;
    const Geometry& g = found.geometry[chain.first];
    for (int64_t step = g.out_height;;) {
      const Flow flow(found.geometry.data(), chain.first, chain.stop, step, images.element);
      const int64_t held = flow.elements() + step * read;
      const int64_t bytes = held * size_of(images.element);
      if (bytes <= kTileBytes || !cuts || step == 1 || step * g.out_width <= kTilePositions) {
        found.flows.push_back(flow);
        found.whole = found.whole && flow.whole();
        found.hidden = std::max(found.hidden, flow.elements());
        found.held = std::max(found.held, held);
        break;
      }
      // About as many parts as would fit, of about the same size, and more than so far.
      const int64_t now = (g.out_height + step - 1) / step;
      const int64_t parts = std::max(now + 1, now * bytes / kTileBytes);
      step = std::min(step - 1, (g.out_height + parts - 1) / parts);
    }
  }
  return found;
}

std::vector<int64_t> Block::inference_lines(const Images& images) const {
  std::vector<int64_t> found;
  for (const Flow& flow : tiling(images, false).flows) found.push_back(flow.step());
  return found;
}

void Block::infer(const Kernels& kernels, const Images& images, const void* x,
                  const std::vector<Weights>& weights, const std::vector<Moments>& moments,
                  void* y, bool pooled, int threads, PackedWeights* packed) const {
  if (images.count == 0) return;
  PackedWeights own_packed(*this);
  if (!packed) packed = &own_packed;
  const Element element = images.element;
  const Tiling tiles_of = tiling(images, pooled);
  const std::vector<Geometry>& geometry = tiles_of.geometry;
  const std::vector<Flow>& flows = tiles_of.flows;
  int64_t scratch = 0, norm_floats = 0;
  for (int64_t index = 0; index < num_units(); ++index) {
    norm_floats += 2 * units_[index].out_channels;
    scratch = std::max(scratch, kernels.scratch(geometry[index], units_[index].depthwise));
  }
  const Geometry& out = geometry[main_units_ - 1];
  const int64_t out_positions = out.out_height * out.out_width;
  std::vector<const float*> weight(num_units());
  for (int64_t index = 0; index < num_units(); ++index) {
    weight[index] =
        packed->get(kernels, units_[index], index, weights[index].weight, true, element);
  }
  float* norms = scratch_memory<float>(kNorm, norm_floats);
  std::vector<Affine> affine(num_units());
  for (int64_t index = 0; index < num_units(); ++index) {
    const int64_t channels = units_[index].out_channels;
    fold(weights[index], moments[index], channels, norms, norms + channels);
    affine[index] = {norms, norms + channels, units_[index].relu};
    norms += 2 * channels;
  }

  // Tiles enough for some threads, where images are small.
  const int64_t few = std::max((images.count + 15) / 16, kTilePositions / out_positions + 1);
  const int64_t most = kTileBytes / (tiles_of.held * size_of(element));
  const int64_t fit = tiles_of.whole ? std::min(most, few) : 1;
  const int64_t tile = std::clamp<int64_t>(fit, 1, images.count);
  const int tiles = static_cast<int>((images.count + tile - 1) / tile);
  const int64_t positions = images.height * images.width;
  const bool aside = num_units() > main_units_ && frame_ == Frame::residual;
  parallel(tiles, threads, [&](int index) {
    const int64_t first = index * tile, count = std::min(tile, images.count - first);
    const void* from = after(x, first * positions * in_channels_, element);
    void* to = after(y, first * (pooled ? 1 : out_positions) * out_channels_,
                     pooled ? kFloat32 : element);
    char* const work = scratch_memory<char>(kHidden, count * tiles_of.hidden * size_of(element));
    float* const memory = scratch_memory<float>(kScratch, scratch);
    const auto run = [&](const Chain& chain, const Flow& flow, Source residual, void* target) {
      const auto lines_of = [&](int i) {
        return static_cast<char*>(after(work, count * flow.place(i), element));
      };
      flow.each([&](int i, int64_t first_line, int64_t stop_line, const std::vector<int64_t>&) {
        const Unit& unit = units_[i];
        const Geometry& g = geometry[i];
        const bool last = i == chain.stop - 1;
        Forward task{};
        task.geometry = g;
        task.stop_image = count;
        task.weight = weight[i];
        task.epilogue = affine[i];
        task.x_lines = g.height;
        if (i == chain.first) {
          task.x = {after(from, chain.x_offset, element), in_channels_, chain.x_step};
          const int64_t stop_row = ((count - 1) * g.height + stop_line) * g.width;
          if (tiles_of.splits) {
            kernels.apply[element]({first_line * g.width, stop_row, in_channels_ / 2,
                                    {from, in_channels_, 2}, {nullptr, nullptr, false},
                                    {nullptr, 0, 1}, {to, out_channels_, 1}});
          }
        } else if (flow.stays(i - 1)) {
          task.x = {lines_of(i - 1), g.in_channels, 1};
          task.x_lines = flow.room(i - 1);
        } else {
          // The lines that have just been made, and no others, lie at the front.
          const int64_t before = first_line * g.width * g.in_channels;
          task.x = {moved(lines_of(i - 1), -before, element), g.in_channels, 1};
        }
        if (last) {
          task.y = {after(target, chain.y_offset, element), out_channels_, 1};
          task.residual = residual;
          if (pooled) task.pooled = static_cast<float*>(target);
        }
        for (int64_t line = first_line; line < stop_line; line = task.stop_line) {
          task.first_line = line;
          task.stop_line = stop_line;
          if (!last) {
            int64_t slot = line - first_line;
            if (flow.stays(i)) {
              slot = line % flow.room(i);
              task.stop_line = std::min(stop_line, line + flow.room(i) - slot);
            }
            const int64_t by = (slot - line) * g.out_width * g.out_channels;
            task.y = {moved(lines_of(i), by, element), g.out_channels, 1};
          }
          (unit.depthwise ? kernels.depthwise_forward
                          : kernels.product_forward)[element](task, memory);
        }
      });
    };
    Source residual{nullptr, 0, 1};
    if (num_units() > main_units_) {
      // A product overwrites its rows before the residual is added, so that has rows of its own.
      void* shortcut = to;
      if (aside) {
        shortcut = scratch_memory<char>(
            kShortcut, count * out_positions * out_channels_ * size_of(element));
      }
      run(shortcut_chain(), flows[1], residual, shortcut);
      if (aside) residual = {shortcut, out_channels_, 1};
    } else if (frame_ == Frame::residual) {
      residual = {from, in_channels_, 1};
    }
    run(main_chain(), flows[0], residual, to);
  });
}

}  // namespace fastshift::cpu

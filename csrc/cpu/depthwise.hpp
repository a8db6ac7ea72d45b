// Depthwise convolutions: a few vectors of channels at a time, the padded lines that a kernel spans
// held in a ring in the first-level cache. Included once per instruction set.

// Vectors of channels read side by side: reading one alone would touch one cache line in many.
constexpr int kForwardGroup = 4;
constexpr int kBackwardGroup = 2;

// Keeps the compiler from holding every weight in a register that it then has to spill.
#define FS_OPAQUE(pointer) asm volatile("" : "+r"(pointer))

// Where line y of a ring of `lines` is. A division takes as long as a good part of a short line.
inline int64_t slot_of(int64_t y, int64_t lines) { return y < lines ? y : y % lines; }

inline int64_t padded_width(const Geometry& g) { return g.width + g.kernel - 1; }

inline int64_t depthwise_scratch(const Geometry& g) {
  const int64_t ring = g.kernel * padded_width(g);
  const int64_t forward = kForwardGroup * ring, backward = 2 * kBackwardGroup * ring;
  return ((forward > backward ? forward : backward) + padded_width(g)) * kLanes;
}

// Asks for the vectors of a line that is read soon, in the order in which lines are read: they lie
// too far apart for the hardware to foresee. The lines [first, stop) of each image are read; a line
// has `width` rows, and of an image `lines` are held.
template <class T>
struct LineAhead {
  Source x;
  int64_t first, stop, lines, width, stop_image;
  int total, group_size, distance;

  void ask(int64_t image, int group, int64_t y) const {
    y += distance;
    while (y >= stop) {
      y -= stop - first;
      group += group_size;
      if (group >= total) {
        group = 0;
        if (++image == stop_image) return;
      }
    }
    const int64_t row = (image * lines + slot_of(y, lines)) * width;
    const T* from = row_of<T>(x, row) + group * kLanes * x.step;
    const int64_t bytes = group_size * kLanes * x.step * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < width; ++i, from += x.row) {
      const char* line = reinterpret_cast<const char*>(from);
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, 2);
    }
  }
};

inline void clear_line(Vec* line, int64_t count) {
  for (int64_t i = 0; i < count; ++i) line[i] = Vec{};
}

// Some vectors of channels of x and the prologue's coefficients for them.
template <class T, int Group>
struct Reader {
  Source x;
  bool affine, relu_after;
  int vectors, last;
  int64_t channel;
  Vec scale[Group], shift[Group];

  Reader(const Source& x, const Affine& prologue, int64_t channels, int64_t channel, int vectors)
      : x(x),
        affine(prologue.scale != nullptr),
        relu_after(prologue.relu),
        vectors(vectors),
        last(lanes_left(channels, channel + (vectors - 1) * kLanes)),
        channel(channel) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t c = channel + v * kLanes;
      scale[v] = affine ? load_some(prologue.scale + c, count(v)) : splat(1.0f);
      shift[v] = affine ? load_some(prologue.shift + c, count(v)) : Vec{};
    }
  }

  int count(int v) const { return v == vectors - 1 ? last : kLanes; }
  int width() const { return (vectors - 1) * kLanes + last; }  // channels of all

  // Line y of an image, padded, into `to`; one vector's line is `plane` after the one before.
  void line(const Geometry& g, int64_t lines, int64_t image, int64_t y, Vec* to,
            int64_t plane) const {
    const int64_t pad = g.kernel / 2, padded = padded_width(g);
    if (y < 0 || y >= g.height) {
      for (int v = 0; v < vectors; ++v) clear_line(to + v * plane, padded);
      return;
    }
    const T* from = row_of<T>(x, (image * lines + slot_of(y, lines)) * g.width) + channel * x.step;
    for (int v = 0; v < vectors; ++v) {
      Vec* here = to + v * plane;
      for (int64_t i = 0; i < pad; ++i) here[i] = here[padded - 1 - i] = Vec{};
      here += pad;
      const T* source = from + v * kLanes * x.step;
      if (count(v) == kLanes && x.step == 1) {
        copy<true>(source, g.width, here, v);
      } else {
        copy<false>(source, g.width, here, v);
      }
    }
  }

 private:
  template <bool Whole>
  Vec read(const T* from, int v) const {
    return Whole ? load(from) : gather(from, x.step, 0, count(v));
  }

  template <bool Whole>
  void copy(const T* source, int64_t width, Vec* to, int v) const {
    const Vec by = scale[v], plus = shift[v];
    if (affine && relu_after) {
      for (int64_t i = 0; i < width; ++i) to[i] = relu(by * read<Whole>(source + i * x.row, v) + plus);
    } else if (affine) {
      for (int64_t i = 0; i < width; ++i) to[i] = by * read<Whole>(source + i * x.row, v) + plus;
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = read<Whole>(source + i * x.row, v);
    }
  }
};

// Lines of taps that read lines of rows: others would add zeros.
struct Taps {
  int first, stop, step;
};

// Of a line of outputs, whose first tap reads line `from` of `lines`, every `step`-th of which is
// there.
inline Taps taps_of(int64_t from, int64_t lines, int kernel, int step) {
  int64_t first = from < 0 ? -from : 0;
  first += (step - (from + first) % step) % step;
  const int64_t stop = (lines - 1) * step + 1 - from;
  return {static_cast<int>(first), static_cast<int>(stop < kernel ? stop : kernel), step};
}

// Positions [from, width) of one line of outputs, `Unroll` at a time, each a sum of `Sets` that do
// not wait for each other; returns where it stopped.
template <int Kernel, int Stride, int Unroll, int Sets, class Emit>
inline int64_t convolve_part(const Vec* const* lines, const Vec* weight, const Taps& span,
                             int64_t from, int64_t width, Emit& emit) {
  for (; from + Unroll <= width; from += Unroll) {
    Vec sum[Sets][Unroll] = {};
    for (int ky = span.first; ky < span.stop; ky += span.step) {
      const Vec *taps = weight + ky * Kernel, *line = lines[ky] + from * Stride;
      FS_OPAQUE(taps);
      FS_OPAQUE(line);
#pragma GCC unroll 7
      for (int kx = 0; kx < Kernel; ++kx) {
        const Vec tap = taps[kx];
#pragma GCC unroll 16
        for (int u = 0; u < Unroll; ++u) sum[kx % Sets][u] += tap * line[u * Stride + kx];
      }
    }
#pragma GCC unroll 16
    for (int u = 0; u < Unroll; ++u) {
#pragma GCC unroll 4
      for (int set = 1; set < Sets; ++set) sum[0][u] += sum[set][u];
      emit(from + u, sum[0][u]);
    }
  }
  return from;
}

template <int Kernel, int Stride, class Emit>
inline void convolve(const Vec* const* lines, const Vec* weight, Taps taps, int64_t width,
                     Emit emit) {
#if FS_LANES == 16
  int64_t x = 0;
  // Widths of maps whose sides halve from 224 or from a power of two.
  if (width % 14 == 0) x = convolve_part<Kernel, Stride, 14, 1>(lines, weight, taps, x, width, emit);
  x = convolve_part<Kernel, Stride, 8, 2>(lines, weight, taps, x, width, emit);
  x = convolve_part<Kernel, Stride, 7, 2>(lines, weight, taps, x, width, emit);
  x = convolve_part<Kernel, Stride, 4, 2>(lines, weight, taps, x, width, emit);
  x = convolve_part<Kernel, Stride, 2, 2>(lines, weight, taps, x, width, emit);
#else
  int64_t x = convolve_part<Kernel, Stride, 4, 1>(lines, weight, taps, 0, width, emit);
  x = convolve_part<Kernel, Stride, 2, 1>(lines, weight, taps, x, width, emit);
#endif
  convolve_part<Kernel, Stride, 1, 1>(lines, weight, taps, x, width, emit);
}

// Inference: the folded batch norm, activation and residual of a line's vector of channels.
template <class T>
struct EmitAffine {
  T* to;
  int64_t to_row;
  const T* residual;
  int64_t residual_row;
  Vec scale, move, least;
  int count;

  __attribute__((always_inline)) void operator()(int64_t x, Vec sum) const {
    Vec value = at_least(least, scale * sum + move);
    if (residual) value += load_some(residual + x * residual_row, count);
    store_some(to + x * to_row, value, count);
  }
};

struct EmitLine {
  Vec* to;
  __attribute__((always_inline)) void operator()(int64_t x, Vec sum) const { to[x] = sum; }
};

template <class T, int Kernel, int Stride>
void depthwise_forward_of(const Forward& task, float* scratch) {
  const Geometry& g = task.geometry;
  constexpr int64_t kPad = Kernel / 2;
  const int64_t channels = g.in_channels, padded = padded_width(g), plane = Kernel * padded;
  const Source& residual = task.residual;
  const bool affine = task.epilogue.scale != nullptr;
  Vec* const ring = reinterpret_cast<Vec*>(scratch);
  Vec* const line = ring + kForwardGroup * plane;
  const int total = static_cast<int>(round_up(channels, kLanes) / kLanes);
  const int64_t first_read = task.first_line * Stride;
  const int64_t first_from = first_read < kPad ? 0 : first_read - kPad;
  const int64_t last_from = (task.stop_line - 1) * Stride + Kernel - kPad;
  const int64_t stop_from = last_from < g.height ? last_from : g.height;
  const LineAhead<T> ahead{task.x, first_from, stop_from, task.x_lines, g.width, task.stop_image,
                           total, kForwardGroup, Kernel / 2 + 2};
  for (int64_t image = task.first_image; image < task.stop_image; ++image) {
    for (int group = 0; group < total; group += kForwardGroup) {
      const int vectors = total - group < kForwardGroup ? total - group : kForwardGroup;
      const Reader<T, kForwardGroup> reader(task.x, task.prologue, channels, group * kLanes, vectors);
      Vec shift[kForwardGroup] = {}, sum[kForwardGroup] = {}, square[kForwardGroup] = {};
      bool started = image != task.first_image;
      if (task.sums && started) {
        for (int64_t c = group * kLanes; c < channels && c < (group + vectors) * kLanes; ++c) {
          shift[c / kLanes - group][c % kLanes] = static_cast<float>(task.sums[c]);
        }
      }
      int64_t read = first_read;  // padded lines in the ring so far
      for (int64_t y = task.first_line; y < task.stop_line; ++y) {
        for (; read < y * Stride + Kernel; ++read) {
          const int64_t from = read - kPad;
          if (from < 0 || from >= g.height) continue;
          reader.line(g, task.x_lines, image, from, ring + read % Kernel * padded, plane);
          ahead.ask(image, group, from);
        }
        const int64_t row = (image * g.out_height + y) * g.out_width;
        for (int v = 0; v < vectors; ++v) {
          const int64_t c = (group + v) * kLanes;
          const int count = reader.count(v);
          const Vec* lines[Kernel];
          for (int ky = 0; ky < Kernel; ++ky) {
            lines[ky] = ring + v * plane + (y * Stride + ky) % Kernel * padded;
          }
          const Vec* weight =
              reinterpret_cast<const Vec*>(task.weight) + (group + v) * Kernel * Kernel;
          const Taps taps = taps_of(y * Stride - kPad, g.height, Kernel, 1);
          T* to = row_of<T>(task.y, row) + c;
          if (task.sums) {
            convolve<Kernel, Stride>(lines, weight, taps, g.out_width, EmitLine{line});
            if (!started) {
              // A line's mean: its first value, at a corner, may lie far off.
              Vec start = {};
              for (int64_t x = 0; x < g.out_width; ++x) start += line[x];
              shift[v] = start * splat(1.0f / static_cast<float>(g.out_width));
              for (int lane = 0; lane < count; ++lane) task.sums[c + lane] = shift[v][lane];
            }
            Vec own = {}, own_square = {};
            for (int64_t x = 0; x < g.out_width; ++x) {
              const Vec value = stored<T>(line[x]);
              const Vec d = value - shift[v];
              own += d;
              own_square += d * d;
              store_some(to + x * task.y.row, value, count);
            }
            sum[v] += own;
            square[v] += own_square;
            continue;
          }
          const EmitAffine<T> emit{to,
                                   task.y.row,
                                   residual.data ? row_of<T>(residual, row) + c : nullptr,
                                   residual.row,
                                   affine ? load_some(task.epilogue.scale + c, count) : splat(1.0f),
                                   affine ? load_some(task.epilogue.shift + c, count) : Vec{},
                                   splat(task.epilogue.relu ? 0.0f : -__builtin_inff()),
                                   count};
          convolve<Kernel, Stride>(lines, weight, taps, g.out_width, emit);
        }
        started = true;
      }
      for (int v = 0; task.sums && v < vectors; ++v) {
        const int64_t c = (group + v) * kLanes;
        add_lanes(task.sums + channels + c, sum[v], reader.count(v));
        add_lanes(task.sums + 2 * channels + c, square[v], reader.count(v));
      }
    }
  }
}

// Adds d raw times the input under it, along one line, for `Rows` lines of taps.
template <int Kernel, int Stride, int Rows>
inline void weight_gradient(const Vec* const* input, const Vec* draw, int64_t width, Vec* to) {
  Vec sum[Rows][Kernel];
#pragma GCC unroll 7
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 7
    for (int kx = 0; kx < Kernel; ++kx) sum[r][kx] = to[r * Kernel + kx];
  }
  for (int64_t x = 0; x < width; ++x) {
    const Vec value = draw[x * Stride];
#pragma GCC unroll 7
    for (int r = 0; r < Rows; ++r) {
      const Vec* line = input[r] + x * Stride;
      FS_OPAQUE(line);
#pragma GCC unroll 7
      for (int kx = 0; kx < Kernel; ++kx) sum[r][kx] += value * line[kx];
    }
  }
#pragma GCC unroll 7
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 7
    for (int kx = 0; kx < Kernel; ++kx) to[r * Kernel + kx] = sum[r][kx];
  }
}

template <int Kernel, int Stride>
inline void all_weight_gradients(const Vec* const* input, const Vec* draw, int64_t width,
                                 Vec* to) {
#if FS_LANES == 16
  constexpr int kRows = Kernel <= 5 ? Kernel : 3;
#else
  constexpr int kRows = Kernel == 3 ? 3 : 1;
#endif
  int ky = 0;
  for (; ky + kRows <= Kernel; ky += kRows) {
    weight_gradient<Kernel, Stride, kRows>(input + ky, draw, width, to + ky * Kernel);
  }
  for (; ky < Kernel; ++ky) {
    weight_gradient<Kernel, Stride, 1>(input + ky, draw, width, to + ky * Kernel);
  }
}

// Some vectors of channels of d raw, at the positions of the input it was computed from, zeros
// between; a line that has none is left as it was.
template <class T>
struct RawGradientReader {
  const Backward& task;
  int vectors, last;
  int64_t channel;
  Vec mean[kBackwardGroup], gain[kBackwardGroup], slope[kBackwardGroup], offset[kBackwardGroup];
  Vec scale[kBackwardGroup], shift[kBackwardGroup];

  RawGradientReader(const Backward& task, int64_t channel, int vectors)
      : task(task),
        vectors(vectors),
        last(lanes_left(task.geometry.in_channels, channel + (vectors - 1) * kLanes)),
        channel(channel) {
    for (int v = 0; v < vectors; ++v) {
      const int count = v == vectors - 1 ? last : kLanes;
      const int64_t c = channel + v * kLanes;
      mean[v] = load_some(task.norm.mean + c, count);
      gain[v] = load_some(task.norm.gain + c, count);
      slope[v] = load_some(task.norm.slope + c, count);
      offset[v] = load_some(task.norm.offset + c, count);
      scale[v] = load_some(task.activation.scale + c, count);
      shift[v] = load_some(task.activation.shift + c, count);
    }
  }

  template <int Kernel, int Stride>
  void line(int64_t image, int64_t y, Vec* to, int64_t plane) const {
    const Geometry& g = task.geometry;
    constexpr int64_t kPad = Kernel / 2;
    const int64_t padded = padded_width(g);
    if (y < 0 || y % Stride || y / Stride >= g.out_height) return;
    for (int v = 0; v < vectors; ++v) {
      Vec* here = to + v * plane;
      if (Stride > 1) {
        clear_line(here, padded);
      } else {
        for (int64_t i = 0; i < kPad; ++i) here[i] = here[padded - 1 - i] = Vec{};
      }
    }
    const int64_t row = (image * g.out_height + y / Stride) * g.out_width;
    const T* raw = row_of<T>(task.raw, row) + channel;
    const T* gradient = row_of<T>(task.gradient, row) + channel;
    for (int v = 0; v < vectors; ++v) {
      const int count = v == vectors - 1 ? last : kLanes;
      Vec* here = to + v * plane + kPad;
      for (int64_t x = 0; x < g.out_width; ++x) {
        const Vec h = load_some(raw + x * task.raw.row + v * kLanes, count);
        Vec d = load_some(gradient + x * task.gradient.row + v * kLanes, count);
        if (task.activation.relu) d = keep_positive(d, scale[v] * h + shift[v]);
        here[x * Stride] = gain[v] * d + slope[v] * (h - mean[v]) + offset[v];
      }
    }
  }
};

template <class T, int Kernel, int Stride>
void depthwise_backward_of(const Backward& task, float* scratch) {
  const Geometry& g = task.geometry;
  constexpr int64_t kPad = Kernel / 2;
  const int64_t channels = g.in_channels, padded = padded_width(g), plane = Kernel * padded;
  Vec* const inputs = reinterpret_cast<Vec*>(scratch);
  Vec* const draws = inputs + kBackwardGroup * plane;
  Vec* const line = draws + kBackwardGroup * plane;
  const int total = static_cast<int>(round_up(channels, kLanes) / kLanes);
  const LineAhead<T> ahead{task.x, 0, g.height, g.height, g.width, task.stop_image,
                           total, kBackwardGroup, Kernel / 2 + 2};
  const LineAhead<T> raw_ahead{task.raw, 0, g.out_height, g.out_height, g.out_width,
                               task.stop_image, total, kBackwardGroup, Kernel / 2 / Stride + 2};
  LineAhead<T> gradient_ahead = raw_ahead;
  gradient_ahead.x = task.gradient;
  const Expanding nothing{};
  ExpandingGradient<T> before(task.before ? *task.before : nothing, task.first_image,
                              kBackwardGroup * kLanes, scratch + round_up(depthwise_scratch(g), 16));
  for (int64_t image = task.first_image; image < task.stop_image; ++image) {
    if (task.before) before.begin(image);
    for (int group = 0; group < total; group += kBackwardGroup) {
      const int vectors = total - group < kBackwardGroup ? total - group : kBackwardGroup;
      const Reader<T, kBackwardGroup> reader(task.x, task.prologue, channels, group * kLanes, vectors);
      const RawGradientReader<T> draw_reader(task, group * kLanes, vectors);
      if (task.before) before.begin_channels(group * kLanes, reader.width());
      Vec taps[kBackwardGroup][Kernel * Kernel] = {};
      Vec sum[kBackwardGroup] = {}, product[kBackwardGroup] = {};
      int64_t read = 0;  // padded lines in both rings so far
      for (int64_t y = 0; y < g.height; ++y) {
        for (; read < y + Kernel; ++read) {
          const int64_t at = read % Kernel * padded;
          const int64_t from = read - kPad;
          reader.line(g, g.height, image, from, inputs + at, plane);
          draw_reader.template line<Kernel, Stride>(image, from, draws + at, plane);
          if (from < 0 || from >= g.height) continue;
          ahead.ask(image, group, from);
          if (from % Stride == 0 && from / Stride < g.out_height) {
            raw_ahead.ask(image, group, from / Stride);
            gradient_ahead.ask(image, group, from / Stride);
          }
        }
        const bool starts = y % Stride == 0 && y / Stride < g.out_height;
        const int64_t row = (image * g.height + y) * g.width;
        for (int v = 0; v < vectors; ++v) {
          const Vec *input[Kernel], *draw[Kernel];
          for (int ky = 0; ky < Kernel; ++ky) {
            const int64_t at = v * plane + (y + ky) % Kernel * padded;
            input[ky] = inputs + at;
            draw[ky] = draws + at;
          }
          if (starts) {
            all_weight_gradients<Kernel, Stride>(input, draw[kPad] + kPad, g.out_width, taps[v]);
          }
          if (!task.dx.data && !task.before) continue;
          const int64_t c = (group + v) * kLanes;
          const int count = reader.count(v);
          convolve<Kernel, 1>(
              draw, reinterpret_cast<const Vec*>(task.weight) + (group + v) * Kernel * Kernel,
              taps_of(y - kPad, g.out_height, Kernel, Stride), g.width, EmitLine{line});
          const Vec* active = task.prologue.relu ? input[kPad] + kPad : nullptr;
          const Vec mean = task.sums ? load_some(task.x_mean + c, count) : Vec{};
          const T* from = row_of<T>(task.x, row) + c * task.x.step;
          Vec own = {}, own_product = {};
          if (task.before) {
            const Vec gain = load_some(task.before->gain + c, count);
            float* to = before.line() + v * kLanes;
            for (int64_t x = 0; x < g.width; ++x, to += reader.width()) {
              const Vec value = active ? keep_positive(line[x], active[x]) : line[x];
              own += value;
              own_product += value * (load_some(from + x * task.x.row, count) - mean);
              store_some(to, gain * value, count);
            }
            sum[v] += own;
            product[v] += own_product;
            continue;
          }
          const T* add = task.add.data ? row_of<T>(task.add, row) + c : nullptr;
          T* to = row_of<T>(task.dx, row);
          for (int64_t x = 0; x < g.width; ++x) {
            Vec value = line[x];
            if (active) value = keep_positive(value, active[x]);
            if (task.sums) {
              value = stored<T>(value);
              own += value;
              own_product += value * (gather(from + x * task.x.row, task.x.step, 0, count) - mean);
            }
            if (add) value += load_some(add + x * task.add.row, count);
            scatter(to + x * task.dx.row, task.dx.step, c, value, count);
          }
          sum[v] += own;
          product[v] += own_product;
        }
        if (task.before) before.line_done();
      }
      for (int v = 0; v < vectors; ++v) {
        const int64_t c = (group + v) * kLanes;
        const int count = reader.count(v);
        for (int tap = 0; tap < Kernel * Kernel; ++tap) {
          float* to = task.dweight + tap * channels + c;
          const Vec before = image > task.first_image ? load_some(to, count) : Vec{};
          store_some(to, before + taps[v][tap], count);
        }
        if (task.sums) {
          add_lanes(task.sums + c, sum[v], count);
          add_lanes(task.sums + channels + c, product[v], count);
        }
      }
    }
  }
}

template <class T>
void depthwise_forward(const Forward& task, float* scratch) {
  const int key = task.geometry.kernel * 10 + task.geometry.stride;
  if (key == 31) return depthwise_forward_of<T, 3, 1>(task, scratch);
  if (key == 32) return depthwise_forward_of<T, 3, 2>(task, scratch);
  if (key == 51) return depthwise_forward_of<T, 5, 1>(task, scratch);
  if (key == 52) return depthwise_forward_of<T, 5, 2>(task, scratch);
  if (key == 71) return depthwise_forward_of<T, 7, 1>(task, scratch);
  if (key == 72) return depthwise_forward_of<T, 7, 2>(task, scratch);
}

template <class T>
void depthwise_backward_by_kernel(const Backward& task, float* scratch) {
  const int key = task.geometry.kernel * 10 + task.geometry.stride;
  if (key == 31) return depthwise_backward_of<T, 3, 1>(task, scratch);
  if (key == 32) return depthwise_backward_of<T, 3, 2>(task, scratch);
  if (key == 51) return depthwise_backward_of<T, 5, 1>(task, scratch);
  if (key == 52) return depthwise_backward_of<T, 5, 2>(task, scratch);
  if (key == 71) return depthwise_backward_of<T, 7, 1>(task, scratch);
  if (key == 72) return depthwise_backward_of<T, 7, 2>(task, scratch);
}

template <class T>
void depthwise_backward(const Backward& task, float* scratch) {
  const bool tiles = kPairs<T> && task.before;
  if (tiles) tile_setup();
  depthwise_backward_by_kernel<T>(task, scratch);
  if (tiles) tile_done();
}

// Pointwise and dense convolutions as products of a chunk of rows that stays in cache. A dense one
// reads, for each output, the inputs under its kernel: rows of [tap][channel]. Included once per
// instruction set.

constexpr int64_t kChunkFloats = 48 * 1024;  // of a chunk's rows, within the second-level cache

// Inputs of one output.
inline int64_t depth(const Geometry& g) { return g.in_channels * g.kernel * g.kernel; }

inline int64_t chunk_rows(const Geometry& geometry) {
  int64_t rows = kChunkFloats / (depth(geometry) + geometry.out_channels);
  rows = rows < 2 * kTileRows ? 2 * kTileRows : rows > 16 * kTileRows ? 16 * kTileRows : rows;
  return rows / kTileRows * kTileRows;
}

// Position in the input of output row `row`.
inline int64_t source_row(const Geometry& geometry, int64_t row) {
  if (geometry.stride == 1) return row;
  const int64_t per_image = geometry.out_height * geometry.out_width;
  const int64_t image = row / per_image, rest = row % per_image;
  const int64_t y = rest / geometry.out_width * geometry.stride;
  const int64_t x = rest % geometry.out_width * geometry.stride;
  return (image * geometry.height + y) * geometry.width + x;
}

// One row of a dense convolution's inputs: calls use(tap, input row or -1) for each tap.
template <class Use>
inline void for_taps(const Geometry& g, int64_t row, const Use& use) {
  const int64_t per_image = g.out_height * g.out_width;
  const int64_t image = row / per_image, rest = row % per_image;
  const int64_t top = rest / g.out_width * g.stride - g.kernel / 2;
  const int64_t left = rest % g.out_width * g.stride - g.kernel / 2;
  for (int ky = 0; ky < g.kernel; ++ky) {
    for (int kx = 0; kx < g.kernel; ++kx) {
      const int64_t y = top + ky, x = left + kx;
      const bool inside = y >= 0 && y < g.height && x >= 0 && x < g.width;
      use(ky * g.kernel + kx, inside ? (image * g.height + y) * g.width + x : -1);
    }
  }
}

struct ReadTap {
  const Geometry& g;
  const Source& x;
  const Affine& prologue;
  float* to;
  void operator()(int tap, int64_t row) const {
    float* here = to + tap * g.in_channels;
    if (row < 0) {
      for (int64_t c = 0; c < g.in_channels; ++c) here[c] = 0.0f;
      return;
    }
    const float* from = x.data + row * x.row;
    for (int64_t c = 0; c < g.in_channels; ++c) {
      float value = from[c * x.step];
      if (prologue.scale) value = prologue.scale[c] * value + prologue.shift[c];
      here[c] = prologue.relu && value < 0.0f ? 0.0f : value;
    }
  }
};

struct AddTap {
  const Geometry& g;
  const Target& dx;
  const float* from;
  void operator()(int tap, int64_t row) const {
    if (row < 0) return;
    float* to = dx.data + row * dx.row;
    const float* here = from + tap * g.in_channels;
    for (int64_t c = 0; c < g.in_channels; ++c) to[c * dx.step] += here[c];
  }
};

// The prologue of rows [first, first + rows) into packed rows of `to`.
inline void read_rows(const Geometry& geometry, const Source& x, const Affine& prologue,
                      int64_t first, int64_t rows, float* to) {
  const int64_t channels = geometry.in_channels;
  if (geometry.kernel > 1) {
    for (int64_t row = 0; row < rows; ++row) {
      for_taps(geometry, first + row, ReadTap{geometry, x, prologue, to + row * depth(geometry)});
    }
    return;
  }
  if (x.step == 1 && geometry.stride == 1) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int count = lanes_left(channels, c);
      const float* from = x.data + first * x.row + c;
      const bool affine = prologue.scale != nullptr;
      const Vec scale = affine ? load_some(prologue.scale + c, count) : splat(1.0f);
      const Vec shift = affine ? load_some(prologue.shift + c, count) : Vec{};
      for (int64_t row = 0; row < rows; ++row) {
        Vec value = load_some(from + row * x.row, count);
        if (affine) value = scale * value + shift;
        if (prologue.relu) value = relu(value);
        store_some(to + row * channels + c, value, count);
      }
    }
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x.data + source_row(geometry, first + row) * x.row;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int count = lanes_left(channels, c);
      const Vec value = apply_affine(gather(from, x.step, c, count), prologue, c, count);
      store_some(to + row * channels + c, value, count);
    }
  }
}

inline bool reads_directly(const Geometry& geometry, const Source& x, const Affine& prologue) {
  return !prologue.scale && !prologue.relu && x.step == 1 && geometry.stride == 1 &&
         geometry.kernel == 1;
}

// Adds rows [first, first + rows) of a column of vectors to the means of their images.
inline void pool_rows(const Forward& task, int64_t first, int64_t rows, const float* from,
                      int64_t from_row, int64_t channel, int count) {
  const Geometry& g = task.geometry;
  const int64_t per_image = g.out_height * g.out_width;
  const Vec share = splat(1.0f / static_cast<float>(per_image));
  for (int64_t row = 0; row < rows;) {
    const int64_t image = (first + row) / per_image;
    const bool begins = (first + row) % per_image == 0;
    Vec sum = {};
    for (; row < rows && (first + row) / per_image == image; ++row) {
      sum += load_some(from + row * from_row, count);
    }
    float* to = task.pooled + image * g.out_channels + channel;
    sum = sum * share;
    if (!begins) sum += load_some(to, count);
    store_some(to, sum, count);
  }
}

void product_forward(const Forward& task, float* scratch) {
  const Geometry& g = task.geometry;
  const int64_t per_image = g.out_height * g.out_width;
  const int64_t begin = task.first_image * per_image, end = task.stop_image * per_image;
  const int64_t chunk = chunk_rows(g);
  const bool direct = reads_directly(g, task.x, task.prologue);
  const int64_t out = g.out_channels;
  const bool affine = task.epilogue.scale != nullptr;
  const int64_t in = depth(g);
  float* const columns_of_y = scratch + chunk * in;
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t rows = end - first < chunk ? end - first : chunk;
    const float* a = scratch;
    int64_t a_row = in;
    if (direct) {
      a = task.x.data + first * task.x.row;
      a_row = task.x.row;
    } else {
      read_rows(g, task.x, task.prologue, first, rows, scratch);
    }
    for (int64_t column = 0; column < out; column += kPanel) {
      const int columns = out - column < kPanel ? static_cast<int>(out - column) : kPanel;
      float* y = task.pooled ? columns_of_y : task.y.data + first * task.y.row + column;
      const int64_t y_row = task.pooled ? kPanel : task.y.row;
      panel_product(rows, in, a, a_row, task.weight + column * in, y, y_row, columns);
      for (int64_t c = column; c < column + columns; c += kLanes) {
        const int count = lanes_left(column + columns, c);
        float* here = y + c - column;
        if (task.sums) {
          if (first == begin) {
            // A mean of some rows: a single one may lie far off.
            const int64_t some = rows < kRunRows ? rows : kRunRows;
            Vec start = {};
            for (int64_t row = 0; row < some; ++row) start += load_some(here + row * y_row, count);
            start = start * splat(1.0f / static_cast<float>(some));
            for (int lane = 0; lane < count; ++lane) task.sums[c + lane] = start[lane];
          }
          Vec shift = {};
          for (int lane = 0; lane < count; ++lane) {
            shift[lane] = static_cast<float>(task.sums[c + lane]);
          }
          Vec sum = {}, square = {};
          for (int64_t run = 0; run < rows; run += kRunRows) {
            const int64_t run_stop = run + kRunRows < rows ? run + kRunRows : rows;
            Vec own = {}, own_square = {};
            for (int64_t row = run; row < run_stop; ++row) {
              const Vec d = load_some(here + row * y_row, count) - shift;
              own += d;
              own_square += d * d;
            }
            sum += own;
            square += own_square;
          }
          add_lanes(task.sums + out + c, sum, count);
          add_lanes(task.sums + 2 * out + c, square, count);
        }
        if (affine || task.epilogue.relu || task.residual.data) {
          const Vec scale = affine ? load_some(task.epilogue.scale + c, count) : splat(1.0f);
          const Vec move = affine ? load_some(task.epilogue.shift + c, count) : Vec{};
          const float* residual =
              task.residual.data ? task.residual.data + first * task.residual.row + c : nullptr;
          for (int64_t row = 0; row < rows; ++row) {
            Vec value = scale * load_some(here + row * y_row, count) + move;
            if (task.epilogue.relu) value = relu(value);
            if (residual) value += load_some(residual + row * task.residual.row, count);
            store_some(here + row * y_row, value, count);
          }
        }
        if (task.pooled) pool_rows(task, first, rows, here, y_row, c, count);
      }
    }
  }
}

// Masks what was added up in dx, and adds its sums and `add`.
inline void finish_scattered(const Backward& task) {
  const Geometry& g = task.geometry;
  const int64_t positions = g.height * g.width, in = g.in_channels;
  for (int64_t image = task.first_image; image < task.stop_image; ++image) {
    for (int64_t c = 0; c < in; c += kLanes) {
      const int count = lanes_left(in, c);
      const Vec mean = task.sums ? load_some(task.x_mean + c, count) : Vec{};
      Vec sum = {}, product = {};
      for (int64_t row = image * positions; row < (image + 1) * positions; ++row) {
        float* to = task.dx.data + row * task.dx.row;
        Vec value = gather(to, task.dx.step, c, count);
        if (task.prologue.relu || task.sums) {
          const Vec x = gather(task.x.data + row * task.x.row, task.x.step, c, count);
          if (task.prologue.relu) {
            value = keep_positive(value, apply_affine(x, task.prologue, c, count));
          }
          sum += value;
          product += value * (x - mean);
        }
        if (task.add.data) value += load_some(task.add.data + row * task.add.row + c, count);
        scatter(to, task.dx.step, c, value, count);
      }
      if (task.sums) {
        add_lanes(task.sums + c, sum, count);
        add_lanes(task.sums + in + c, product, count);
      }
    }
  }
}

// What follows the product for dx where each of its rows is one row of dx: mask, sums, `add`.
inline void finish_rows(const Backward& task, int64_t first, int64_t rows, const float* a,
                        int64_t a_row, float* dx, int64_t dx_row, int64_t c, int count) {
  if (task.prologue.relu) {
    for (int64_t row = 0; row < rows; ++row) {
      const Vec value = load_some(dx + row * dx_row, count);
      store_some(dx + row * dx_row, keep_positive(value, load_some(a + row * a_row + c, count)),
                 count);
    }
  }
  if (task.sums) {
    const Vec mean = load_some(task.x_mean + c, count);
    const float* x = task.x.data + first * task.x.row + c;
    Vec sum = {}, product = {};
    for (int64_t row = 0; row < rows; ++row) {
      const Vec value = load_some(dx + row * dx_row, count);
      sum += value;
      product += value * (load_some(x + row * task.x.row, count) - mean);
    }
    add_lanes(task.sums + c, sum, count);
    add_lanes(task.sums + task.geometry.in_channels + c, product, count);
  }
  const float* add = task.add.data ? task.add.data + first * task.add.row + c : nullptr;
  float* to = task.dx.data + first * task.dx.row;
  for (int64_t row = 0; row < rows; ++row) {
    Vec value = load_some(dx + row * dx_row, count);
    if (add) value += load_some(add + row * task.add.row, count);
    scatter(to + row * task.dx.row, task.dx.step, c, value, count);
  }
}

void product_backward(const Backward& task, float* scratch) {
  const Geometry& g = task.geometry;
  const int64_t per_image = g.out_height * g.out_width;
  const int64_t begin = task.first_image * per_image, end = task.stop_image * per_image;
  const int64_t chunk = chunk_rows(g);
  const bool direct = reads_directly(g, task.x, task.prologue);
  const bool scattered = g.stride > 1 || g.kernel > 1;
  const int64_t in = depth(g), out = g.out_channels;
  float* draw = scratch;
  float* rows_of_x = draw + chunk * out;
  float* rows_of_dx = rows_of_x + chunk * in;
  if (task.dx.data && scattered) {
    const int64_t positions = g.height * g.width;
    for (int64_t row = task.first_image * positions; row < task.stop_image * positions; ++row) {
      float* to = task.dx.data + row * task.dx.row;
      for (int64_t c = 0; c < g.in_channels; ++c) to[c * task.dx.step] = 0.0f;
    }
  }
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t rows = end - first < chunk ? end - first : chunk;
    const float* a = rows_of_x;
    int64_t a_row = in;
    if (direct) {
      a = task.x.data + first * task.x.row;
      a_row = task.x.row;
    } else {
      read_rows(g, task.x, task.prologue, first, rows, rows_of_x);
    }
    norm_backward(rows, out, task.raw.data + first * task.raw.row, task.raw.row,
                  task.gradient.data + first * task.gradient.row, task.gradient.row,
                  task.activation, task.norm, draw);
    outer_product(rows, out, in, draw, out, a, a_row, task.dweight, in);
    if (!task.dx.data) continue;
    for (int64_t column = 0; column < in; column += kPanel) {
      const int columns = in - column < kPanel ? static_cast<int>(in - column) : kPanel;
      panel_product(rows, out, draw, out, task.weight + column * out, rows_of_dx + column, in,
                    columns);
      for (int64_t c = column; !scattered && c < column + columns; c += kLanes) {
        finish_rows(task, first, rows, a, a_row, rows_of_dx + c, in, c,
                    lanes_left(column + columns, c));
      }
    }
    for (int64_t row = 0; scattered && row < rows; ++row) {
      const AddTap add{g, task.dx, rows_of_dx + row * in};
      for_taps(g, first + row, add);
    }
  }
  if (task.dx.data && scattered) finish_scattered(task);
}

// Pointwise and dense convolutions as products of a chunk of rows that stays in cache. A dense one
// reads, for each output, the inputs under its kernel: rows of [tap][channel]. Included once per
// instruction set.

constexpr int64_t kChunkFloats = 96 * 1024;  // of a chunk's rows, within the second-level cache

// Inputs of one output.
inline int64_t depth(const Geometry& g) { return g.in_channels * g.kernel * g.kernel; }

// Rows of a chunk are a multiple.
#if defined(FS_AMX)
constexpr int64_t kChunkStep = kPairRows;
#else
constexpr int64_t kChunkStep = kTileRows;
#endif

inline int64_t chunk_rows(const Geometry& geometry) {
  int64_t rows = kChunkFloats / (depth(geometry) + geometry.out_channels);
  rows = rows < 2 * kTileRows ? 2 * kTileRows : rows > 16 * kTileRows ? 16 * kTileRows : rows;
  return round_up(rows / kTileRows * kTileRows, kChunkStep);
}

// Rows of each of as many chunks as `total` rows need, all of about the same size.
inline int64_t even_chunk(const Geometry& geometry, int64_t total) {
  const int64_t most = chunk_rows(geometry), chunks = (total + most - 1) / most;
  return chunks < 2 ? most : round_up((total + chunks - 1) / chunks, kChunkStep);
}

#if defined(FS_PAIRS)
template <class T>
constexpr bool kPairs = sizeof(T) == sizeof(Bf16);

// Floats of operands in bfloat16: `rows` of `widest` values, `columns` of them, a panel of pairs.
inline int64_t pairs_room(int64_t rows, int64_t widest, int64_t columns) {
  return 64 + (round_up(rows, kPairRows) * pair_depth(widest) +
               round_up(columns, kPairRows) * pair_depth(rows)) / 2 +
         packed_pairs_size(rows, kPanel);
}
#else
template <class T>
constexpr bool kPairs = false;
inline int64_t pairs_room(int64_t, int64_t, int64_t) { return 0; }
inline void tile_setup() {}
inline void tile_done() {}
#endif

inline int64_t product_scratch(const Geometry& g) {
  const int64_t widest = depth(g) > g.out_channels ? depth(g) : g.out_channels;
  const bool scattered = g.stride > 1 || g.kernel > 1;
  const int64_t rows_of_dx = scattered ? chunk_rows(g) * depth(g) : 0;
  return chunk_rows(g) * (g.out_channels + depth(g) + kPanel) + rows_of_dx +
         pairs_room(chunk_rows(g), widest, g.out_channels) +
         (scattered ? g.height * g.width * g.in_channels : 0);
}

// Rows of a chunk as one operand of products.
struct Operand {
  const float* rows;
  int64_t row;
  const Bf16* pairs;  // the same in bfloat16, where products take that
  int64_t pairs_row;
};

// Where packed weights of depth `k` have the panel of a column, from row `from` on.
template <class T>
inline const float* panel_at(const float* weight, int64_t k, int64_t column, int64_t from) {
#if defined(FS_PAIRS)
  if constexpr (kPairs<T>) return weight + (column * pair_depth(k) + from * kPanel) / 2;
#endif
  return weight + column * k + from * kPanel;
}

template <class T, class Finish>
inline void multiply_panel(int64_t rows, int64_t k, const Operand& a, const float* panel,
                           int columns, Finish& finish, Ahead& ahead) {
#if defined(FS_PAIRS)
  if constexpr (kPairs<T>) {
    pairs_product(rows, k, a.pairs, a.pairs_row, panel, columns, finish, ahead);
    return;
  }
#endif
  panel_product(rows, k, a.rows, a.row, panel, columns, finish, ahead);
}

template <class T, class Finish>
inline void multiply(int64_t rows, int64_t k, const Operand& a, const float* weight, int64_t column,
                     int columns, Finish& finish, Ahead& ahead) {
  multiply_panel<T>(rows, k, a, panel_at<T>(weight, k, column, 0), columns, finish, ahead);
}

// Fills in what products in bfloat16 read of rows of floats; `to` holds pairs_scratch().
template <class T>
inline void narrow_operand(Operand& a, int64_t rows, int64_t k, float* to) {
#if defined(FS_PAIRS)
  if constexpr (kPairs<T>) {
    Bf16* pairs = reinterpret_cast<Bf16*>(to);
    narrow_rows(a.rows, rows, k, pairs, pair_depth(k));
    a.pairs = pairs;
    a.pairs_row = pair_depth(k);
  }
#endif
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

template <class T>
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
    const T* from = row_of<T>(x, row);
    for (int64_t c = 0; c < g.in_channels; ++c) {
      float value = value_of(from[c * x.step]);
      if (prologue.scale) value = prologue.scale[c] * value + prologue.shift[c];
      here[c] = prologue.relu && value < 0.0f ? 0.0f : value;
    }
  }
};

// Adds to the rows [position][channel] of one image.
struct AddTap {
  const Geometry& g;
  int64_t first_position;
  const float* from;
  float* dx;
  void operator()(int tap, int64_t row) const {
    if (row < 0) return;
    float* to = dx + (row - first_position) * g.in_channels;
    const float* here = from + tap * g.in_channels;
    for (int64_t c = 0; c < g.in_channels; ++c) to[c] += here[c];
  }
};

// The prologue of rows [first, first + rows) into packed rows of `to`.
template <class T>
inline void read_rows(const Geometry& geometry, const Source& x, const Affine& prologue,
                      int64_t first, int64_t rows, float* to) {
  const int64_t channels = geometry.in_channels;
  for (int64_t row = first; row < first + rows; ++row, to += depth(geometry)) {
    if (geometry.kernel > 1) {
      for_taps(geometry, row, ReadTap<T>{geometry, x, prologue, to});
      continue;
    }
    const T* from = row_of<T>(x, source_row(geometry, row));
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int count = lanes_left(channels, c);
      store_some(to + c, apply_affine(gather(from, x.step, c, count), prologue, c, count), count);
    }
  }
}

// The same in bfloat16, zeros up to `to_row`.
template <class T>
inline void read_narrow_rows(const Source& x, const Affine& prologue, const Geometry& g,
                             int64_t first, int64_t rows, Bf16* to, int64_t to_row) {
  for (int64_t row = first; row < first + rows; ++row, to += to_row) {
    const T* from = row_of<T>(x, source_row(g, row));
    for (int64_t c = 0; c < to_row; c += kLanes) {
      Vec value = {};
      if (c < g.in_channels) {
        const int count = lanes_left(g.in_channels, c);
        value = apply_affine(gather(from, x.step, c, count), prologue, c, count);
      }
      store(to + c, value);
    }
  }
}

inline bool reads_directly(const Geometry& geometry, const Source& x, const Affine& prologue) {
  return !prologue.scale && !prologue.relu && x.step == 1 && geometry.stride == 1 &&
         geometry.kernel == 1;
}

// A chunk of rows as an operand: where they lie if they can be read there, else in `scratch`, or in
// bfloat16 in `pairs`.
template <class T>
inline void read_operand(const Geometry& g, const Source& x, const Affine& prologue, int64_t first,
                         int64_t rows, float* scratch, float* pairs, Operand& a) {
  const bool direct = reads_directly(g, x, prologue);
  if constexpr (kPairs<T>) {
#if defined(FS_PAIRS)
    const T* from = row_of<T>(x, first);
    // Tiles read whole blocks of rows, and all of a step's depth.
    if (direct && g.in_channels % kPairDepth == 0 && rows % kPairRows == 0) {
      a.pairs = from;
      a.pairs_row = x.row;
      return;
    }
    if (g.kernel == 1) {
      Bf16* to = reinterpret_cast<Bf16*>(pairs);
      a.pairs = to;
      a.pairs_row = pair_depth(g.in_channels);
      read_narrow_rows<T>(x, prologue, g, first, rows, to, a.pairs_row);
      return;
    }
#endif
  } else if (sizeof(T) == sizeof(float) && direct) {
    a.rows = reinterpret_cast<const float*>(row_of<T>(x, first));
    a.row = x.row;
    return;
  }
  read_rows<T>(g, x, prologue, first, rows, scratch);
  narrow_operand<T>(a, rows, depth(g), pairs);
}

// Rows of x that a later chunk reads.
template <class T>
inline void look_ahead(Ahead& ahead, int index, const Source& x, int64_t first, int64_t stop) {
  if (x.data && first < stop) ahead.add(index, row_of<T>(x, first), (stop - first - 1) * x.row);
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

template <class T>
void product_forward(const Forward& task, float* scratch) {
  if (kPairs<T>) tile_setup();
  const Geometry& g = task.geometry;
  const int64_t per_image = g.out_height * g.out_width;
  const int64_t begin = task.first_image * per_image + task.first_line * g.out_width;
  const int64_t end = (task.stop_image - 1) * per_image + task.stop_line * g.out_width;
  const int64_t chunk = chunk_rows(g), in = depth(g), out = g.out_channels;
  const bool streams = g.kernel == 1 && g.stride == 1;
  const int64_t panels = round_up(out, kPanel) / kPanel;
  float* const columns_of_y = scratch + chunk * in;
  float* const pairs = scratch + round_up(chunk * (in + kPanel), 16);
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t rows = end - first < chunk ? end - first : chunk;
    Operand a{scratch, in, nullptr, 0};
    read_operand<T>(g, task.x, task.prologue, first, rows, scratch, pairs, a);
    Ahead ahead;
    const int64_t next = first + rows, stop = next + chunk < end ? next + chunk : end;
    if (streams) look_ahead<T>(ahead, 0, task.x, next, stop);
    look_ahead<T>(ahead, 1, task.residual, next, stop);
    ahead.divide((rows / kTileRows + 1) * panels);
    for (int64_t column = 0; column < out; column += kPanel) {
      const int columns = out - column < kPanel ? static_cast<int>(out - column) : kPanel;
      if (task.sums) {
        StoreSums<T> store(out, column, row_of<T>(task.y, first) + column, task.y.row,
                           first == begin);
        for (int c = 0; first != begin && c < columns; ++c) {
          store.shift[c / kLanes][c % kLanes] = static_cast<float>(task.sums[column + c]);
        }
        multiply<T>(rows, in, a, task.weight, column, columns, store, ahead);
        for (int v = 0; v * kLanes < columns; ++v) {
          double* sums = task.sums + column + v * kLanes;
          for (int lane = 0; lane < store.counts[v] && lane < kLanes; ++lane) {
            sums[lane] = store.shift[v][lane];
          }
          add_lanes(sums + out, store.total[v], store.counts[v]);
          add_lanes(sums + 2 * out, store.squares[v], store.counts[v]);
        }
      } else if (task.pooled) {
        StoreAffine<float> store(task, column, columns_of_y, kPanel, first);
        multiply<T>(rows, in, a, task.weight, column, columns, store, ahead);
        for (int v = 0; v * kLanes < columns; ++v) {
          pool_rows(task, first, rows, columns_of_y + v * kLanes, kPanel, column + v * kLanes,
                    store.counts[v]);
        }
      } else {
        StoreAffine<T> store(task, column, row_of<T>(task.y, first) + column, task.y.row, first);
        multiply<T>(rows, in, a, task.weight, column, columns, store, ahead);
      }
    }
  }
  if (kPairs<T>) tile_done();
}

// One image's gradient of x, added up in rows [position][channel]: mask, sums and `add`.
template <class T>
inline void finish_scattered(const Backward& task, int64_t image, const float* dx) {
  const Geometry& g = task.geometry;
  const int64_t positions = g.height * g.width, in = g.in_channels;
  for (int64_t c = 0; c < in; c += kLanes) {
    const int count = lanes_left(in, c);
    const Vec mean = task.sums ? load_some(task.x_mean + c, count) : Vec{};
    Vec sum = {}, product = {};
    for (int64_t position = 0; position < positions; ++position) {
      const int64_t row = image * positions + position;
      Vec value = load_some(dx + position * in + c, count);
      if (task.prologue.relu || task.sums) {
        const Vec x = gather(row_of<T>(task.x, row), task.x.step, c, count);
        if (task.prologue.relu) {
          value = keep_positive(value, apply_affine(x, task.prologue, c, count));
        }
        value = stored<T>(value);
        sum += value;
        product += value * (x - mean);
      }
      if (task.add.data) value += load_some(row_of<T>(task.add, row) + c, count);
      scatter(row_of<T>(task.dx, row), task.dx.step, c, value, count);
    }
    if (task.sums) {
      add_lanes(task.sums + c, sum, count);
      add_lanes(task.sums + in + c, product, count);
    }
  }
}

// to[out][in] += draw^T times the rows of x; `begins`: = in place of +=.
template <class T>
inline void weight_gradient_of(int64_t in, int64_t out, float* to, int64_t rows, const float* draw,
                               const float* a, int64_t a_row, float* scratch, bool begins,
                               Ahead& ahead) {
#if defined(FS_PAIRS)
  if constexpr (kPairs<T>) {
    const int64_t k = pair_depth(rows);
    Bf16* columns_of_draw = reinterpret_cast<Bf16*>(scratch);
    float* panel = scratch + round_up(out, kPairRows) * k / 2;
    narrow_columns(draw, rows, out, columns_of_draw);
    for (int64_t column = 0; column < in; column += kPanel) {
      const int columns = in - column < kPanel ? static_cast<int>(in - column) : kPanel;
      pack_pairs(a + column, a_row, rows, columns, panel, k / 2);
      if (begins) {
        StoreRows store(in, column, to + column, in);
        pairs_product(out, rows, columns_of_draw, k, panel, columns, store, ahead);
      } else {
        AddRows store(in, column, to + column, in);
        pairs_product(out, rows, columns_of_draw, k, panel, columns, store, ahead);
      }
    }
    return;
  }
#endif
  outer_product(rows, out, in, draw, out, a, a_row, to, in, begins, ahead);
}

// Rows [begin, end) of outputs; `scattered`: where one image's gradient of x is added up, or null.
template <class T>
inline void product_backward_rows(const Backward& task, int64_t begin, int64_t end, float* scratch,
                                  float* scattered, int64_t first_position) {
  const Geometry& g = task.geometry;
  const int64_t chunk = even_chunk(g, end - begin), in = depth(g), out = g.out_channels;
  const bool direct = sizeof(T) == sizeof(float) && reads_directly(g, task.x, task.prologue);
  const int64_t panels = round_up(in, kPanel) / kPanel;
  const int64_t written = task.first_image * g.out_height * g.out_width;  // first of the task
  float* draw = scratch;
  float* rows_of_x = draw + chunk * out;
  float* rows_of_dx = rows_of_x + chunk * in;
  float* pairs = scratch + round_up(chunk * (out + (scattered ? 2 : 1) * in), 16);
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t rows = end - first < chunk ? end - first : chunk;
    const float* a = rows_of_x;
    int64_t a_row = in;
    if (direct) {
      a = reinterpret_cast<const float*>(row_of<T>(task.x, first));
      a_row = task.x.row;
    } else {
      read_rows<T>(g, task.x, task.prologue, first, rows, rows_of_x);
    }
    norm_backward<T>(task, first, rows, draw);
    Ahead ahead;
    const int64_t next = first + rows, stop = next + chunk < end ? next + chunk : end;
    look_ahead<T>(ahead, 0, task.raw, next, stop);
    look_ahead<T>(ahead, 1, task.gradient, next, stop);
    if (g.kernel == 1 && g.stride == 1) look_ahead<T>(ahead, 2, task.x, next, stop);
    ahead.divide((out / kTileRows + (task.dx.data ? rows / kTileRows : 0)) * panels);
    Operand d{draw, out, nullptr, 0};
    weight_gradient_of<T>(in, out, task.dweight, rows, draw, a, a_row, pairs, first == written,
                          ahead);
    if (!task.dx.data) continue;
    narrow_operand<T>(d, rows, out, pairs);
    for (int64_t column = 0; column < in; column += kPanel) {
      const int columns = in - column < kPanel ? static_cast<int>(in - column) : kPanel;
      if (scattered) {
        StoreRows store(in, column, rows_of_dx + column, in);
        multiply<T>(rows, out, d, task.weight, column, columns, store, ahead);
      } else {
        StoreGradient<T> store(task, first, column, a, a_row);
        multiply<T>(rows, out, d, task.weight, column, columns, store, ahead);
        store.add_sums();
      }
    }
    for (int64_t row = 0; scattered && row < rows; ++row) {
      const AddTap add{g, first_position, rows_of_dx + row * in, scattered};
      for_taps(g, first + row, add);
    }
  }
}

template <class T>
inline void product_backward_images(const Backward& task, float* scratch) {
  const Geometry& g = task.geometry;
  const int64_t per_image = g.out_height * g.out_width, positions = g.height * g.width;
  if (!task.dx.data || (g.stride == 1 && g.kernel == 1)) {
    product_backward_rows<T>(task, task.first_image * per_image, task.stop_image * per_image,
                             scratch, nullptr, 0);
    return;
  }
  float* dx = scratch + product_scratch(g) - positions * g.in_channels;
  for (int64_t image = task.first_image; image < task.stop_image; ++image) {
    for (int64_t i = 0; i < positions * g.in_channels; ++i) dx[i] = 0.0f;
    product_backward_rows<T>(task, image * per_image, (image + 1) * per_image, scratch, dx,
                             image * positions);
    finish_scattered<T>(task, image, dx);
  }
}

template <class T>
void product_backward(const Backward& task, float* scratch) {
  if (kPairs<T>) tile_setup();
  product_backward_images<T>(task, scratch);
  if (kPairs<T>) tile_done();
}

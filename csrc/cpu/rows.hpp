// Passes over rows of channels: affine, masks and sums. Included once per instruction set.

template <class T>
inline const T* row_of(const Source& x, int64_t row) {
  return static_cast<const T*>(x.data) + row * x.row;
}
template <class T>
inline T* row_of(const Target& x, int64_t row) {
  return static_cast<T*>(x.data) + row * x.row;
}

inline Vec apply_affine(Vec x, const Affine& affine, int64_t channel, int count) {
  if (affine.scale) {
    x = load_some(affine.scale + channel, count) * x + load_some(affine.shift + channel, count);
  }
  return affine.relu ? relu(x) : x;
}

// Channels [channel, channel + count) of a row whose channels lie `step` apart.
template <class T>
inline Vec gather(const T* row, int64_t step, int64_t channel, int count) {
  if (step == 1) return load_some(row + channel, count);
  if (step == 2 && count == kLanes) return load_alternate(row + 2 * channel);
  Vec value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = value_of(row[(channel + lane) * step]);
  return value;
}

template <class T>
inline void scatter(T* row, int64_t step, int64_t channel, Vec value, int count) {
  if (step == 1) {
    store_some(row + channel, value, count);
  } else if (step == 2 && count == kLanes) {
    store_alternate(row + 2 * channel, value);
  } else {
    for (int lane = 0; lane < count; ++lane) set_value(row + (channel + lane) * step, value[lane]);
  }
}

// Rows that one run of float additions spans; runs are added up in turn, so that the sum of a chunk
// is about as exact as one in double.
constexpr int64_t kRunRows = 16;

inline void add_lanes(double* to, Vec value, int count) {
  for (int lane = 0; lane < count; ++lane) to[lane] += value[lane];
}

void add(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int some = lanes_left(count, i);
    store_some(to + i, load_some(to + i, some) + load_some(from + i, some), some);
  }
}

// d raw of rows [first, first + rows) into packed rows of `to`.
template <class T>
inline void norm_backward(const Backward& task, int64_t first, int64_t rows, float* to) {
  const int64_t channels = task.geometry.out_channels;
  const NormBackward& norm = task.norm;
  const Affine& activation = task.activation;
  for (int64_t row = first; row < first + rows; ++row, to += channels) {
    const T* raw = row_of<T>(task.raw, row);
    const T* gradient = row_of<T>(task.gradient, row);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int count = lanes_left(channels, c);
      const Vec h = load_some(raw + c, count);
      Vec g = load_some(gradient + c, count);
      if (activation.relu) {
        g = keep_positive(
            g, load_some(activation.scale + c, count) * h + load_some(activation.shift + c, count));
      }
      g = load_some(norm.gain + c, count) * g +
          load_some(norm.slope + c, count) * (h - load_some(norm.mean + c, count)) +
          load_some(norm.offset + c, count);
      store_some(to + c, g, count);
    }
  }
}

template <class T>
void apply(const Apply& task) {
  for (int64_t row = task.first_row; row < task.stop_row; ++row) {
    const T* x = row_of<T>(task.x, row);
    const T* residual = task.residual.data ? row_of<T>(task.residual, row) : nullptr;
    T* y = row_of<T>(task.y, row);
    for (int64_t c = 0; c < task.channels; c += kLanes) {
      const int count = lanes_left(task.channels, c);
      Vec value = apply_affine(gather(x, task.x.step, c, count), task.affine, c, count);
      if (residual) value += gather(residual, task.residual.step, c, count);
      scatter(y, task.y.step, c, value, count);
    }
  }
}

constexpr int64_t kSumRows = 128;  // rows that a float sum may span
constexpr int kSumVectors = 4;     // vectors side by side: memory is read in longer pieces

template <class T>
void reduce(const Reduce& task) {
  constexpr int64_t kWidth = kSumVectors * kLanes;
  for (int64_t first = task.first_row; first < task.stop_row; first += kSumRows) {
    const int64_t stop = first + kSumRows < task.stop_row ? first + kSumRows : task.stop_row;
    for (int64_t column = 0; column < task.channels; column += kWidth) {
      const int64_t end = column + kWidth < task.channels ? column + kWidth : task.channels;
      Vec sum[kSumVectors] = {}, product[kSumVectors] = {};
      for (int64_t run = first; run < stop; run += kRunRows) {
        const int64_t run_stop = run + kRunRows < stop ? run + kRunRows : stop;
        Vec own[kSumVectors] = {}, own_product[kSumVectors] = {};
        for (int64_t row = run; row < run_stop; ++row) {
          const T* raw = row_of<T>(task.raw, row);
          const T* gradient = row_of<T>(task.gradient, row);
#pragma GCC unroll 4
          for (int v = 0; v < kSumVectors; ++v) {
            const int64_t c = column + v * kLanes;
            if (c >= end) break;
            const int count = lanes_left(end, c);
            const Vec h = load_some(raw + c, count);
            Vec g = load_some(gradient + c, count);
            if (task.activation.relu) {
              g = keep_positive(g, load_some(task.activation.scale + c, count) * h +
                                       load_some(task.activation.shift + c, count));
            }
            own[v] += g;
            own_product[v] += g * (h - load_some(task.mean + c, count));
          }
        }
        for (int v = 0; v < kSumVectors; ++v) {
          sum[v] += own[v];
          product[v] += own_product[v];
        }
      }
      for (int64_t c = column; c < end; c += kLanes) {
        const int v = static_cast<int>((c - column) / kLanes), count = lanes_left(end, c);
        add_lanes(task.sums + c, sum[v], count);
        add_lanes(task.sums + task.channels + c, product[v], count);
      }
    }
  }
}

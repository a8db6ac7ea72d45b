// Passes over rows of channels: affine, masks and sums. Included once per instruction set.

inline Vec apply_affine(Vec x, const Affine& affine, int64_t channel, int count) {
  if (affine.scale) {
    x = load_some(affine.scale + channel, count) * x + load_some(affine.shift + channel, count);
  }
  return affine.relu ? relu(x) : x;
}

inline Vec gather(const float* row, int64_t step, int64_t channel, int count) {
  if (step == 1) return load_some(row + channel, count);
  Vec value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = row[(channel + lane) * step];
  return value;
}

inline void scatter(float* row, int64_t step, int64_t channel, Vec value, int count) {
  if (step == 1) {
    store_some(row + channel, value, count);
  } else {
    for (int lane = 0; lane < count; ++lane) row[(channel + lane) * step] = value[lane];
  }
}

// Rows that one run of float additions spans; runs are added up in turn, so that the sum of a chunk
// is about as exact as one in double.
constexpr int64_t kRunRows = 16;

inline void add_lanes(double* to, Vec value, int count) {
  for (int lane = 0; lane < count; ++lane) to[lane] += value[lane];
}

template <bool Relu>
inline void norm_backward_of(int64_t rows, int64_t channels, const float* raw, int64_t raw_row,
                             const float* gradient, int64_t gradient_row, const Affine& activation,
                             const NormBackward& norm, float* to) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int count = lanes_left(channels, c);
    const Vec mean = load_some(norm.mean + c, count), gain = load_some(norm.gain + c, count);
    const Vec slope = load_some(norm.slope + c, count), offset = load_some(norm.offset + c, count);
    const Vec scale = load_some(activation.scale + c, count);
    const Vec shift = load_some(activation.shift + c, count);
    for (int64_t row = 0; row < rows; ++row) {
      const Vec h = load_some(raw + row * raw_row + c, count);
      Vec g = load_some(gradient + row * gradient_row + c, count);
      if (Relu) g = keep_positive(g, scale * h + shift);
      store_some(to + row * channels + c, gain * g + slope * (h - mean) + offset, count);
    }
  }
}

// d raw of `rows` rows into packed rows of `to`.
inline void norm_backward(int64_t rows, int64_t channels, const float* raw, int64_t raw_row,
                          const float* gradient, int64_t gradient_row, const Affine& activation,
                          const NormBackward& norm, float* to) {
  if (activation.relu) {
    norm_backward_of<true>(rows, channels, raw, raw_row, gradient, gradient_row, activation, norm, to);
  } else {
    norm_backward_of<false>(rows, channels, raw, raw_row, gradient, gradient_row, activation, norm,
                            to);
  }
}

void apply(const Apply& task) {
  for (int64_t row = task.first_row; row < task.stop_row; ++row) {
    const float* x = task.x.data + row * task.x.row;
    const float* residual =
        task.residual.data ? task.residual.data + row * task.residual.row : nullptr;
    float* y = task.y.data + row * task.y.row;
    for (int64_t c = 0; c < task.channels; c += kLanes) {
      const int count = lanes_left(task.channels, c);
      Vec value = apply_affine(gather(x, task.x.step, c, count), task.affine, c, count);
      if (residual) value += gather(residual, task.residual.step, c, count);
      scatter(y, task.y.step, c, value, count);
    }
  }
}

constexpr int64_t kSumRows = 128;  // rows that a float sum may span

void reduce(const Reduce& task) {
  for (int64_t first = task.first_row; first < task.stop_row; first += kSumRows) {
    const int64_t stop = first + kSumRows < task.stop_row ? first + kSumRows : task.stop_row;
    for (int64_t c = 0; c < task.channels; c += kLanes) {
      const int count = lanes_left(task.channels, c);
      const Vec mean = load_some(task.mean + c, count);
      const Vec scale = load_some(task.activation.scale + c, count);
      const Vec shift = load_some(task.activation.shift + c, count);
      Vec sum = {}, product = {};
      for (int64_t run = first; run < stop; run += kRunRows) {
        const int64_t run_stop = run + kRunRows < stop ? run + kRunRows : stop;
        Vec own = {}, own_product = {};
        for (int64_t row = run; row < run_stop; ++row) {
          const Vec h = load_some(task.raw.data + row * task.raw.row + c, count);
          Vec g = load_some(task.gradient.data + row * task.gradient.row + c, count);
          if (task.activation.relu) g = keep_positive(g, scale * h + shift);
          own += g;
          own_product += g * (h - mean);
        }
        sum += own;
        product += own_product;
      }
      add_lanes(task.sums + c, sum, count);
      add_lanes(task.sums + task.channels + c, product, count);
    }
  }
}

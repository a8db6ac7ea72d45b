// The backward pass of a pointwise unit along with the depthwise one behind it: what arrives, some
// channels of some lines at a time, goes through both products while it is in cache. Included once
// per instruction set.

constexpr int64_t kBandRows = 192;  // rows that products and their sums run well with

inline int64_t band_rows(const Geometry& before) { return kBandRows + before.width; }

inline int64_t expanding_room(const Geometry& before, int64_t channels) {
  const int64_t band = round_up(band_rows(before) * channels, 16);
  return round_up(before.height * before.width * before.in_channels, 16) + band +
         pairs_room(band_rows(before), channels, channels);
}

// Rows [first, first + rows) of what the prologue gave, without the centre.
template <class T>
inline void centred_rows(const Geometry& g, const Source& x, const Affine& prologue,
                         const float* centre, int64_t first, int64_t rows, float* to) {
  read_rows<T>(g, x, prologue, first, rows, to);
  for (int64_t row = 0; row < rows; ++row, to += g.in_channels) {
    for (int64_t c = 0; c < g.in_channels; c += kLanes) {
      const int count = lanes_left(g.in_channels, c);
      store_some(to + c, load_some(to + c, count) - load_some(centre + c, count), count);
    }
  }
}

template <class T>
void centre(const Geometry& g, const Source& x, const Affine& prologue, float* to) {
  const int64_t positions = g.height * g.width, rows = positions < 64 ? positions : 64;
  const Vec share = splat(1.0f / static_cast<float>(rows));
  for (int64_t c = 0; c < g.in_channels; c += kLanes) {
    const int count = lanes_left(g.in_channels, c);
    Vec sum = {};
    for (int64_t row = 0; row < rows; ++row) {
      sum += apply_affine(gather(row_of<T>(x, row), x.step, c, count), prologue, c, count);
    }
    store_some(to + c, sum * share, count);
  }
}

template <class T>
class ExpandingGradient {
 public:
  // `channels`: the most that arrive together; `scratch` holds expanding_room().
  ExpandingGradient(const Expanding& task, int64_t first_image, int64_t channels, float* scratch)
      : task_(task),
        first_image_(first_image),
        in_(task.geometry.in_channels),
        positions_(task.geometry.height * task.geometry.width),
        rows_(scratch),
        band_(scratch + round_up(positions_ * in_, 16)),
        pairs_(band_ + round_up(band_rows(task.geometry) * channels, 16)) {}

  // An image whose rows come next.
  void begin(int64_t image) {
    image_ = image;
    centred_rows<T>(task_.geometry, task_.x, task_.prologue, task_.centre, image * positions_,
                    positions_, rows_);
    Ahead none;
    outer_product(positions_, in_, in_, rows_, in_, rows_, in_, task_.squares, in_, image == first_image_,
                  none);
    for (int64_t c = 0; c < in_; c += kLanes) {
      const int count = lanes_left(in_, c);
      for (int64_t first = 0; first < positions_; first += kRunRows) {
        const int64_t stop = first + kRunRows < positions_ ? first + kRunRows : positions_;
        Vec sum = {};
        for (int64_t row = first; row < stop; ++row) {
          sum += load_some(rows_ + row * in_ + c, count);
        }
        add_lanes(task_.sums + c, sum, count);
      }
    }
  }

  // Channels [channel, channel + count) of its first row come next.
  void begin_channels(int64_t channel, int64_t count) {
    channel_ = channel;
    count_ = count;
    first_ = filled_ = 0;
  }

  // Where the next line of gain * g goes, [width][count]; `line_done` follows.
  float* line() const { return band_ + filled_ * count_; }

  void line_done() {
    filled_ += task_.geometry.width;
    if (filled_ >= kBandRows || first_ + filled_ == positions_) flush();
  }

 private:
  void flush() {
    const float* x = rows_ + first_ * in_;
    Ahead none;
    weight_gradient_of<T>(in_, count_, task_.dweight + channel_ * in_, filled_, band_, x, in_,
                          pairs_, image_ == first_image_ && first_ == 0, none);
    if (task_.dx) {
      Operand a{band_, count_, nullptr, 0};
      narrow_operand<T>(a, filled_, count_, pairs_);
      float* dx = task_.dx + (image_ * positions_ + first_) * in_;
      for (int64_t column = 0; column < in_; column += kPanel) {
        const int columns = in_ - column < kPanel ? static_cast<int>(in_ - column) : kPanel;
        const float* panel = panel_at<T>(task_.weight, task_.geometry.out_channels, column, channel_);
        if (channel_ == 0) {
          StoreRows store(in_, column, dx + column, in_);
          multiply_panel<T>(filled_, count_, a, panel, columns, store, none);
        } else {
          AddRows store(in_, column, dx + column, in_);
          multiply_panel<T>(filled_, count_, a, panel, columns, store, none);
        }
      }
    }
    first_ += filled_;
    filled_ = 0;
  }

  const Expanding& task_;
  const int64_t first_image_, in_, positions_;
  float *const rows_, *const band_, *const pairs_;  // the image's centred rows, a band of gain * g
  int64_t image_ = 0, channel_ = 0, count_ = 0;
  int64_t first_ = 0, filled_ = 0;  // rows done, rows in the band
};

template <class T>
void correct(const Backward& task, float* scratch) {
  if (kPairs<T>) tile_setup();
  const Geometry& g = task.geometry;
  const int64_t per_image = g.height * g.width, in = g.in_channels;
  const int64_t begin = task.first_image * per_image, end = task.stop_image * per_image;
  const int64_t chunk = even_chunk(g, end - begin);
  float* const active = scratch;
  float* const centred = active + chunk * in;
  float* const pairs = scratch + round_up(2 * chunk * in, 16);
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t rows = end - first < chunk ? end - first : chunk;
    if (task.prologue.relu) read_rows<T>(g, task.x, task.prologue, first, rows, active);
    centred_rows<T>(g, task.x, task.prologue, task.centre, first, rows, centred);
    Operand a{centred, in, nullptr, 0};
    narrow_operand<T>(a, rows, in, pairs);
    Ahead ahead;
    const int64_t next = first + rows, stop = next + chunk < end ? next + chunk : end;
    look_ahead<T>(ahead, 0, task.x, next, stop);
    look_ahead<float>(ahead, 1, {task.partial, in, 1}, next, stop);
    look_ahead<T>(ahead, 2, task.add, next, stop);
    ahead.divide((rows / kTileRows + 1) * (round_up(in, kPanel) / kPanel));
    for (int64_t column = 0; column < in; column += kPanel) {
      const int columns = in - column < kPanel ? static_cast<int>(in - column) : kPanel;
      StoreGradient<T> store(task, first, column, active, in);
      multiply<T>(rows, in, a, task.weight, column, columns, store, ahead);
      store.add_sums();
    }
  }
  if (kPairs<T>) tile_done();
}

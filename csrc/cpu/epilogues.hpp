// What becomes of a product's sums while they are in registers. Included once per instruction set.
// Each has `tile`, and `keep`, which takes over what a copy of it has added up.

// What a panel does with its sums, in registers. `counts`: channels of each of its vectors.
struct Columns {
  int counts[kTileVectors];
  Columns(int64_t channels, int64_t column) {
    for (int v = 0; v < kTileVectors; ++v) counts[v] = lanes_left(channels, column + v * kLanes);
  }
};

struct StoreRows : Columns {
  float* to;
  int64_t to_row;
  StoreRows(int64_t channels, int64_t column, float* to, int64_t to_row)
      : Columns(channels, column), to(to), to_row(to_row) {}
  void keep(const StoreRows&) {}

  template <int Rows, int Vectors>
  __attribute__((always_inline)) void tile(int64_t row, Vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        store_some(to + (row + r) * to_row + v * kLanes, sum[r][v], counts[v]);
      }
    }
  }
};

struct AddRows : Columns {
  float* to;
  int64_t to_row;
  AddRows(int64_t channels, int64_t column, float* to, int64_t to_row)
      : Columns(channels, column), to(to), to_row(to_row) {}
  void keep(const AddRows&) {}

  template <int Rows, int Vectors>
  __attribute__((always_inline)) void tile(int64_t row, Vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        float* here = to + (row + r) * to_row + v * kLanes;
        store_some(here, load_some(here, counts[v]) + sum[r][v], counts[v]);
      }
    }
  }
};

// Training: the raw output, and the sums of what was stored.
template <class T>
struct StoreSums : Columns {
  T* to;
  int64_t to_row;
  Vec shift[kTileVectors] = {}, total[kTileVectors] = {}, squares[kTileVectors] = {};
  bool starts;  // the shift is yet to be chosen
  StoreSums(int64_t channels, int64_t column, T* to, int64_t to_row, bool starts)
      : Columns(channels, column), to(to), to_row(to_row), starts(starts) {}
  void keep(const StoreSums& own) { *this = own; }

  template <int Rows, int Vectors>
  __attribute__((always_inline)) void tile(int64_t row, Vec (&sum)[Rows][Vectors]) {
    if (starts) {
      // A mean of some rows: a single one may lie far off.
      starts = false;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Vec mean = {};
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) mean += sum[r][v];
        shift[v] = mean * splat(1.0f / Rows);
      }
    }
    Vec own[Vectors] = {}, own_squares[Vectors] = {};
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const Vec value = stored<T>(sum[r][v]);
        store_some(to + (row + r) * to_row + v * kLanes, value, counts[v]);
        const Vec d = value - shift[v];
        own[v] += d;
        own_squares[v] += d * d;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      total[v] += own[v];
      squares[v] += own_squares[v];
    }
  }
};

// Inference: the folded batch norm, activation and residual.
template <class T>
struct StoreAffine : Columns {
  T* to;
  int64_t to_row;
  const T* residual;
  int64_t residual_row;
  Vec scale[kTileVectors], move[kTileVectors], least;
  StoreAffine(const Forward& task, int64_t column, T* to, int64_t to_row, int64_t first)
      : Columns(task.geometry.out_channels, column),
        to(to),
        to_row(to_row),
        residual(task.residual.data ? row_of<T>(task.residual, first) + column : nullptr),
        residual_row(task.residual.row),
        least(splat(task.epilogue.relu ? 0.0f : -__builtin_inff())) {
    for (int v = 0; v < kTileVectors; ++v) {
      const bool affine = task.epilogue.scale && counts[v] > 0;
      const int64_t c = column + v * kLanes;
      scale[v] = affine ? load_some(task.epilogue.scale + c, counts[v]) : splat(1.0f);
      move[v] = affine ? load_some(task.epilogue.shift + c, counts[v]) : Vec{};
    }
  }
  void keep(const StoreAffine&) {}

  template <int Rows, int Vectors>
  __attribute__((always_inline)) void tile(int64_t row, Vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        Vec value = at_least(least, scale[v] * sum[r][v] + move[v]);
        if (residual) {
          value += load_some(residual + (row + r) * residual_row + v * kLanes, counts[v]);
        }
        store_some(to + (row + r) * to_row + v * kLanes, value, counts[v]);
      }
    }
  }
};

// The gradient of x: mask, sums and `add`. `active`: packed rows of what the prologue gave.
template <class T>
struct StoreGradient : Columns {
  const Backward& task;
  int64_t first, column;
  const float* active;
  int64_t active_row;
  const T* x;
  const T* add;
  const float* partial;
  T* to;
  Vec mean[kTileVectors], constant[kTileVectors];
  Vec total[kTileVectors] = {}, products[kTileVectors] = {};
  StoreGradient(const Backward& task, int64_t first, int64_t column, const float* active,
                int64_t active_row)
      : Columns(task.geometry.in_channels, column),
        task(task),
        first(first),
        column(column),
        active(task.prologue.relu ? active + column : nullptr),
        active_row(active_row),
        x(row_of<T>(task.x, first) + column),
        add(task.add.data ? row_of<T>(task.add, first) + column : nullptr),
        partial(task.partial ? task.partial + first * task.geometry.in_channels + column : nullptr),
        to(row_of<T>(task.dx, first) + column * task.dx.step) {
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t c = column + v * kLanes;
      const bool there = counts[v] > 0;
      mean[v] = task.sums && there ? load_some(task.x_mean + c, counts[v]) : Vec{};
      constant[v] = partial && there ? load_some(task.constant + c, counts[v]) : Vec{};
    }
  }
  void keep(const StoreGradient& own) {
    for (int v = 0; v < kTileVectors; ++v) {
      total[v] = own.total[v];
      products[v] = own.products[v];
    }
  }

  template <int Rows, int Vectors>
  __attribute__((always_inline)) void tile(int64_t row, Vec (&sum)[Rows][Vectors]) {
    Vec own[Vectors] = {}, own_products[Vectors] = {};
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = row + r, c = v * kLanes;
        Vec value = sum[r][v];
        if (partial) {
          value += constant[v] + load_some(partial + at * task.geometry.in_channels + c, counts[v]);
        }
        if (active) {
          value = keep_positive(value, load_some(active + at * active_row + c, counts[v]));
        }
        if (task.sums) {
          value = stored<T>(value);
          own[v] += value;
          own_products[v] += value * (load_some(x + at * task.x.row + c, counts[v]) - mean[v]);
        }
        if (add) value += load_some(add + at * task.add.row + c, counts[v]);
        scatter(to + at * task.dx.row, task.dx.step, c, value, counts[v]);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      total[v] += own[v];
      products[v] += own_products[v];
    }
  }

  void add_sums() const {
    for (int v = 0; task.sums && v < kTileVectors && counts[v] > 0; ++v) {
      double* sums = task.sums + column + v * kLanes;
      add_lanes(sums, total[v], counts[v]);
      add_lanes(sums + task.geometry.in_channels, products[v], counts[v]);
    }
  }
};

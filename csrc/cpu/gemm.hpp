// Small matrix products, rows that lie in cache. Included once per instruction set.

#if FS_LANES == 16
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
constexpr int kPanel = kTileVectors * kLanes;  // columns of a packed panel

// Room for `k` x `columns` in panels, in floats.
inline int64_t packed_size(int64_t k, int64_t columns) { return k * round_up(columns, kPanel); }

// Pack element (k, column) = from[k * k_step + column * column_step] into panels of kPanel columns,
// zero beyond the last.
inline void pack(const float* from, int64_t k_step, int64_t column_step, int64_t k, int64_t columns,
                 float* to) {
  for (int64_t first = 0; first < columns; first += kPanel) {
    const int64_t width = columns - first < kPanel ? columns - first : kPanel;
    if (column_step == 1) {
      for (int64_t row = 0; row < k; ++row) {
        const float* source = from + row * k_step + first;
        for (int64_t column = 0; column < width; ++column) to[row * kPanel + column] = source[column];
        for (int64_t column = width; column < kPanel; ++column) to[row * kPanel + column] = 0.0f;
      }
    } else {
      for (int64_t column = 0; column < kPanel; ++column) {
        if (column < width) {
          const float* source = from + (first + column) * column_step;
          for (int64_t row = 0; row < k; ++row) to[row * kPanel + column] = source[row * k_step];
        } else {
          for (int64_t row = 0; row < k; ++row) to[row * kPanel + column] = 0.0f;
        }
      }
    }
    to += k * kPanel;
  }
}

// to[rows, columns] = a[rows, k] * panel[k, kPanel], `columns` of the panel kept.
template <int Rows>
inline void tile_product(int64_t k, const float* a, int64_t a_row, const float* panel, float* to,
                         int64_t to_row, int columns) {
  Vec sum[Rows][kTileVectors] = {};
  for (int64_t step = 0; step < k; ++step) {
    Vec b[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) b[v] = load(panel + step * kPanel + v * kLanes);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const Vec value = splat(a[row * a_row + step]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[row][v] += value * b[v];
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int left = columns - v * kLanes;
      if (left > 0) store_some(to + row * to_row + v * kLanes, sum[row][v], left);
    }
  }
}

template <int Rows>
inline void tile_product_tail(int64_t rows, int64_t k, const float* a, int64_t a_row,
                              const float* panel, float* to, int64_t to_row, int columns) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      tile_product<Rows>(k, a, a_row, panel, to, to_row, columns);
    } else {
      tile_product_tail<Rows - 1>(rows, k, a, a_row, panel, to, to_row, columns);
    }
  }
}

// to[rows, kPanel] = a * one packed panel.
inline void panel_product(int64_t rows, int64_t k, const float* a, int64_t a_row,
                          const float* panel, float* to, int64_t to_row, int columns) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    tile_product<kTileRows>(k, a + row * a_row, a_row, panel, to + row * to_row, to_row, columns);
  }
  tile_product_tail<kTileRows - 1>(rows - row, k, a + row * a_row, a_row, panel, to + row * to_row,
                                   to_row, columns);
}

// to[Rows, columns] += left[rows, Rows]^T * right[rows, columns], a sum over the rows.
template <int Rows>
inline void tile_outer(int64_t rows, const float* left, int64_t left_row, const float* right,
                       int64_t right_row, float* to, int64_t to_row, int columns) {
  Vec sum[Rows][kTileVectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int some = columns - v * kLanes;
      sum[i][v] = some > 0 ? load_some(to + i * to_row + v * kLanes, some) : Vec{};
    }
  }
  if (columns == kPanel) {
    for (int64_t row = 0; row < rows; ++row) {
      Vec b[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) b[v] = load(right + row * right_row + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vec value = splat(left[row * left_row + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[i][v] += value * b[v];
      }
    }
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      Vec b[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int some = columns - v * kLanes;
        b[v] = some > 0 ? load_some(right + row * right_row + v * kLanes, some) : Vec{};
      }
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vec value = splat(left[row * left_row + i]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[i][v] += value * b[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      const int some = columns - v * kLanes;
      if (some > 0) store_some(to + i * to_row + v * kLanes, sum[i][v], some);
    }
  }
}

template <int Rows>
inline void tile_outer_tail(int64_t count, int64_t rows, const float* left, int64_t left_row,
                            const float* right, int64_t right_row, float* to, int64_t to_row,
                            int columns) {
  if constexpr (Rows > 0) {
    if (count == Rows) {
      tile_outer<Rows>(rows, left, left_row, right, right_row, to, to_row, columns);
    } else {
      tile_outer_tail<Rows - 1>(count, rows, left, left_row, right, right_row, to, to_row, columns);
    }
  }
}

// to[m, n] += left[rows, m]^T * right[rows, n].
inline void outer_product(int64_t rows, int64_t m, int64_t n, const float* left, int64_t left_row,
                          const float* right, int64_t right_row, float* to, int64_t to_row) {
  for (int64_t column = 0; column < n; column += kPanel) {
    const int columns = n - column < kPanel ? static_cast<int>(n - column) : kPanel;
    int64_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows) {
      tile_outer<kTileRows>(rows, left + i, left_row, right + column, right_row,
                            to + i * to_row + column, to_row, columns);
    }
    tile_outer_tail<kTileRows - 1>(m - i, rows, left + i, left_row, right + column, right_row,
                                   to + i * to_row + column, to_row, columns);
  }
}

// Small matrix products, rows that lie in cache. Included once per instruction set.

#if FS_LANES == 16
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kFewRows = kTileRows / 3;
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
    int64_t row = 0;
    if (width == kPanel && k_step == 1) {
      for (; row + kLanes <= k; row += kLanes) {
        for (int v = 0; v < kTileVectors; ++v) {
          Vec square[kLanes];
          const float* source = from + row + (first + v * kLanes) * column_step;
          for (int i = 0; i < kLanes; ++i) square[i] = load(source + i * column_step);
          transpose(square);
          for (int i = 0; i < kLanes; ++i) store(to + (row + i) * kPanel + v * kLanes, square[i]);
        }
      }
    }
    // Written line by line; what is read stays in the first-level cache.
    for (; row < k; ++row) {
      const float* source = from + row * k_step + first * column_step;
      float* line = to + row * kPanel;
      if (width == kPanel && column_step == 1) {
        for (int v = 0; v < kTileVectors; ++v) store(line + v * kLanes, load(source + v * kLanes));
      } else if (width == kPanel) {
#pragma GCC unroll 8
        for (int column = 0; column < kPanel; ++column) line[column] = source[column * column_step];
      } else {
        for (int64_t column = 0; column < kPanel; ++column) {
          line[column] = column < width ? source[column * column_step] : 0.0f;
        }
      }
    }
    to += k * kPanel;
  }
}

// Memory that will be read next, asked for while products keep the core busy.
struct Ahead {
  const char* at[3] = {};
  const char* stop[3] = {};
  int64_t share = 0;  // lines that one tile asks for

  template <class T>
  void add(int index, const T* from, int64_t count) {
    at[index] = reinterpret_cast<const char*>(from);
    stop[index] = reinterpret_cast<const char*>(from + count);
  }
  void divide(int64_t tiles) {
    int64_t bytes = 0;
    for (int i = 0; i < 3; ++i) bytes += stop[i] - at[i];
    share = bytes / 64 / (tiles > 0 ? tiles : 1) + 1;
  }
  // The next lines, at most `most`; returns how many from `from` on.
  int64_t next(int64_t most, const char*& from) {
    for (int i = 0; i < 3; ++i) {
      const int64_t left = (stop[i] - at[i]) / 64;
      if (left <= 0) continue;
      int64_t lines = share < most ? share : most;
      lines = lines < left ? lines : left;
      from = at[i];
      at[i] += lines * 64;
      return lines;
    }
    return 0;
  }
};

template <int Rows, int Vectors>
__attribute__((always_inline)) inline void tile_step(Vec (&sum)[Rows][Vectors], const float* a,
                                                     int64_t a_row, const float* panel) {
  Vec b[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
    const Vec value = splat(a[row * a_row]);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[row][v] += value * b[v];
  }
}

// Rows [row, row + Rows) of a[rows, k] * panel[k, Vectors], handed to `finish` in registers.
template <int Rows, int Vectors, class Finish>
inline void tile_product(int64_t row, int64_t k, const float* a, int64_t a_row, const float* panel,
                         Finish& finish, Ahead& ahead) {
  Vec sum[Rows][Vectors] = {};
  a += row * a_row;
  const char* line = nullptr;
  const int64_t lines = ahead.next(k, line);
  int64_t step = 0;
  for (; step < lines; ++step, line += 64) {
    __builtin_prefetch(line, 0, 2);
    tile_step<Rows, Vectors>(sum, a + step, a_row, panel + step * kPanel);
  }
  for (; step < k; ++step) {
    tile_step<Rows, Vectors>(sum, a + step, a_row, panel + step * kPanel);
  }
  finish.template tile<Rows, Vectors>(row, sum);
}

template <int Vectors, class Finish>
inline void panel_of(int64_t rows, int64_t k, const float* a, int64_t a_row, const float* panel,
                     Finish& finish, Ahead& ahead) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    tile_product<kTileRows, Vectors>(row, k, a, a_row, panel, finish, ahead);
  }
  for (; row + kFewRows <= rows; row += kFewRows) {
    tile_product<kFewRows, Vectors>(row, k, a, a_row, panel, finish, ahead);
  }
  for (; row < rows; ++row) {
    tile_product<1, Vectors>(row, k, a, a_row, panel, finish, ahead);
  }
}

// a[rows, k] times one packed panel, of which `columns` count.
template <class Finish>
inline void panel_product(int64_t rows, int64_t k, const float* a, int64_t a_row,
                          const float* panel, int columns, Finish& finish, Ahead& ahead) {
  if (columns > kLanes) {
    panel_of<kTileVectors>(rows, k, a, a_row, panel, finish, ahead);
  } else {
    panel_of<1>(rows, k, a, a_row, panel, finish, ahead);
  }
}

// to[Rows, columns] += left[rows, Rows]^T * right[rows, columns], a sum over the rows; `begins`: what
// is there does not count.
template <int Rows, int Vectors, bool Whole>
inline void tile_outer(int64_t rows, const float* left, int64_t left_row, const float* right,
                       int64_t right_row, float* to, int64_t to_row, const int* counts,
                       bool begins, Ahead& ahead) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      sum[i][v] = begins ? Vec{} : load_some(to + i * to_row + v * kLanes, counts[v]);
    }
  }
  const char* line = nullptr;
  int64_t lines = ahead.next(rows, line);
  for (int64_t row = 0; row < rows; ++row) {
    if (lines-- > 0) {
      __builtin_prefetch(line, 0, 2);
      line += 64;
    }
    Vec b[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const float* from = right + row * right_row + v * kLanes;
      b[v] = Whole ? load(from) : load_some(from, counts[v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec value = splat(left[row * left_row + i]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[i][v] += value * b[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      store_some(to + i * to_row + v * kLanes, sum[i][v], counts[v]);
    }
  }
}

template <int Vectors, bool Whole>
inline void outer_of(int64_t rows, int64_t m, const float* left, int64_t left_row,
                     const float* right, int64_t right_row, float* to, int64_t to_row,
                     const int* counts, bool begins, Ahead& ahead) {
  int64_t i = 0;
  for (; i + kTileRows <= m; i += kTileRows) {
    tile_outer<kTileRows, Vectors, Whole>(rows, left + i, left_row, right, right_row,
                                          to + i * to_row, to_row, counts, begins, ahead);
  }
  for (; i + kFewRows <= m; i += kFewRows) {
    tile_outer<kFewRows, Vectors, Whole>(rows, left + i, left_row, right, right_row,
                                         to + i * to_row, to_row, counts, begins, ahead);
  }
  for (; i < m; ++i) {
    tile_outer<1, Vectors, Whole>(rows, left + i, left_row, right, right_row, to + i * to_row,
                                  to_row, counts, begins, ahead);
  }
}

// to[m, n] += left[rows, m]^T * right[rows, n]; `begins`: = in place of +=.
inline void outer_product(int64_t rows, int64_t m, int64_t n, const float* left, int64_t left_row,
                          const float* right, int64_t right_row, float* to, int64_t to_row,
                          bool begins, Ahead& ahead) {
  for (int64_t column = 0; column < n; column += kPanel) {
    const int counts[kTileVectors] = {lanes_left(n, column), lanes_left(n, column + kLanes)};
    const float* from = right + column;
    if (counts[1] == kLanes) {
      outer_of<kTileVectors, true>(rows, m, left, left_row, from, right_row, to + column, to_row,
                                   counts, begins, ahead);
    } else if (counts[1] > 0) {
      outer_of<kTileVectors, false>(rows, m, left, left_row, from, right_row, to + column, to_row,
                                    counts, begins, ahead);
    } else {
      outer_of<1, false>(rows, m, left, left_row, from, right_row, to + column, to_row, counts,
                         begins, ahead);
    }
  }
}

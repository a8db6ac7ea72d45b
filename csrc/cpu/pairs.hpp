// Products of bfloat16 with sums in float, where the machine has instructions for them: pairs of
// neighbouring k, by tiles (AMX) or by vectors (AVX-512 bf16). Included once per instruction set
// that defines FS_PAIRS.

constexpr int64_t kPairDepth = 32;  // k of one tile; operands are padded with zeros to it
constexpr int64_t kPairRows = 32;   // rows of two tiles; what is read of `a` is padded to it

inline int64_t pair_depth(int64_t k) { return round_up(k, kPairDepth); }
// Floats of `k` x `columns` in panels: [k / 2][kPanel] pairs each.
inline int64_t packed_pairs_size(int64_t k, int64_t columns) {
  return pair_depth(k) / 2 * round_up(columns, kPanel);
}

// `pairs` pairs of rows of one panel from rows [k][columns]; zeros beyond.
inline void pack_pairs(const float* from, int64_t from_row, int64_t k, int columns, float* to,
                       int64_t pairs) {
  for (int64_t pair = 0; pair < pairs; ++pair, to += kPanel) {
    for (int v = 0; v < kTileVectors; ++v) {
      const int count = columns - v * kLanes < kLanes ? columns - v * kLanes : kLanes;
      const float* here = from + 2 * pair * from_row + v * kLanes;
      const bool even = count > 0 && 2 * pair < k, odd = count > 0 && 2 * pair + 1 < k;
      const Halves first = narrow(even ? load_some(here, count) : Vec{});
      const Halves second = narrow(odd ? load_some(here + from_row, count) : Vec{});
      const Words pairs = words_of(first) | (words_of(second) << 16);
      store(to + v * kLanes, (Vec)pairs);
    }
  }
}

// The same of what lies the other way round, `columns` rows of [k].
inline void pack_pairs_of_rows(const float* from, int64_t from_row, int64_t k, int columns,
                               float* to) {
  for (int64_t step = 0; step < pair_depth(k); step += kPairDepth, to += kLanes * kPanel) {
    for (int v = 0; v < kTileVectors; ++v) {
      Vec words[kLanes] = {};
      for (int c = 0; c < kLanes && v * kLanes + c < columns; ++c) {
        const float* here = from + (v * kLanes + c) * from_row;
        alignas(64) uint16_t pairs[2 * kLanes] = {};
        for (int64_t at = step; at < step + kPairDepth && at < k; at += kLanes) {
          const Halves some = narrow(load_some(here + at, lanes_left(k, at)));
          __builtin_memcpy(pairs + (at - step), &some, sizeof(some));
        }
        __builtin_memcpy(&words[c], pairs, sizeof(pairs));
      }
      transpose(words);
      for (int pair = 0; pair < kLanes; ++pair) store(to + pair * kPanel + v * kLanes, words[pair]);
    }
  }
}

// Rows of floats as rows of bfloat16, zeros up to `to_row`.
inline void narrow_rows(const float* from, int64_t rows, int64_t k, Bf16* to, int64_t to_row) {
  for (int64_t row = 0; row < rows; ++row, from += k, to += to_row) {
    for (int64_t c = 0; c < to_row; c += kLanes) {
      store(to + c, c < k ? load_some(from + c, lanes_left(k, c)) : Vec{});
    }
  }
}

// The transpose of rows of floats, [k][pair_depth(rows)] in bfloat16, zeros beyond.
inline void narrow_columns(const float* from, int64_t rows, int64_t k, Bf16* to) {
  const int64_t to_row = pair_depth(rows);
  for (int64_t c = 0; c < k; c += kLanes) {
    const int count = lanes_left(k, c);
    for (int64_t first = 0; first < to_row; first += kLanes) {
      Vec block[kLanes] = {};
      for (int row = 0; row < kLanes && first + row < rows; ++row) {
        block[row] = load_some(from + (first + row) * k + c, count);
      }
      transpose(block);
      for (int lane = 0; lane < count; ++lane) store(to + (c + lane) * to_row + first, block[lane]);
    }
  }
}

#if defined(FS_AMX)

// A tile of sums is [16][16] floats; of `a` [16 rows][32 k], of `b` [16 pairs][16 columns].
#if defined(FS_EMULATED)
struct Tiles {
  uint8_t data[8][16][64];
};
inline Tiles& tiles() {
  static thread_local Tiles held;
  return held;
}
inline void tile_setup() {}
inline void tile_done() {}
template <int Tile>
inline void tile_zero() {
  __builtin_memset(tiles().data[Tile], 0, sizeof(tiles().data[Tile]));
}
template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy(tiles().data[Tile][row], static_cast<const char*>(from) + row * stride, 64);
  }
}
template <int Tile>
inline void tile_store(void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles().data[Tile][row], 64);
  }
}
template <int C, int A, int B>
inline void tile_dot() {
  float sums[16][16];
  Bf16 a[16][32], b[16][32];
  __builtin_memcpy(sums, tiles().data[C], sizeof(sums));
  __builtin_memcpy(a, tiles().data[A], sizeof(a));
  __builtin_memcpy(b, tiles().data[B], sizeof(b));
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      for (int k = 0; k < 32; ++k) {
        sums[row][column] += value_of(a[row][k]) * value_of(b[k / 2][2 * column + k % 2]);
      }
    }
  }
  __builtin_memcpy(tiles().data[C], sums, sizeof(sums));
}
#define FS_TILE_ZERO(tile) tile_zero<tile>()
#define FS_TILE_LOAD(tile, from, stride) tile_load<tile>(from, stride)
#define FS_TILE_STORE(tile, to, stride) tile_store<tile>(to, stride)
#define FS_TILE_DOT(c, a, b) tile_dot<c, a, b>()
#else
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
// Eight tiles of 16 rows of 64 bytes.
constexpr TileShapes kTileShapes = {1,
                                    0,
                                    {},
                                    {64, 64, 64, 64, 64, 64, 64, 64},
                                    {16, 16, 16, 16, 16, 16, 16, 16}};
// At the start of each task: other libraries set the tiles of this thread up in their own way.
inline void tile_setup() {
  const TileShapes* shapes = &kTileShapes;
  asm volatile("" : "+r"(shapes) : : "memory");
  _tile_loadconfig(shapes);
}
inline void tile_done() { _tile_release(); }
// Literal numbers: GCC spells them into its assembly.
#define FS_TILE_ZERO(tile) _tile_zero(tile)
#define FS_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define FS_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define FS_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

template <int Rows, int Vectors, class Finish>
__attribute__((always_inline)) inline void finish_rows(const float* sums, int64_t row,
                                                       Finish& finish) {
  Vec some[Rows][Vectors];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) some[r][v] = load(sums + r * kPanel + v * kLanes);
  }
  finish.template tile<Rows, Vectors>(row, some);
}

// Rows [row, row + count) of a panel, whose sums lie in memory.
template <int Vectors, class Finish>
inline void finish_block(const float* sums, int64_t row, int64_t count, Finish& finish) {
  Finish own = finish;  // in registers: for all the compiler knows a store may change `finish`
  int64_t at = 0;
  for (; at + kFewRows <= count; at += kFewRows) {
    finish_rows<kFewRows, Vectors>(sums + at * kPanel, row + at, own);
  }
  for (; at < count; ++at) finish_rows<1, Vectors>(sums + at * kPanel, row + at, own);
  finish.keep(own);
}

// a[rows, k] times one panel of pairs, of which `columns` count; `a` has rows up to a multiple of
// kPairRows, whatever is in them.
template <class Finish>
inline void pairs_product(int64_t rows, int64_t k, const Bf16* a, int64_t a_row, const float* panel,
                          int columns, Finish& finish, Ahead& ahead) {
  // Two blocks' sums in turn: one's are finished while the tiles work on the next.
  alignas(64) float blocks[2][kPairRows * kPanel];
  const int64_t depth = pair_depth(k), stride = a_row * static_cast<int64_t>(sizeof(Bf16));
  // The tiles' instructions do not tell the compiler that they read the operands.
  asm volatile("" : : "r"(a), "r"(panel) : "memory");
  const auto finish_at = [&](int64_t row) {
    const float* sums = blocks[row / kPairRows % 2];
    const int64_t count = rows - row < kPairRows ? rows - row : kPairRows;
    if (columns > kLanes) {
      finish_block<kTileVectors>(sums, row, count, finish);
    } else {
      finish_block<1>(sums, row, count, finish);
    }
  };
  int64_t row = 0;
  for (; row < rows; row += kPairRows) {
    float* sums = blocks[row / kPairRows % 2];
    const Bf16* here = a + row * a_row;
    const char* line = nullptr;
    for (int64_t lines = ahead.next(depth, line); lines > 0; --lines, line += 64) {
      __builtin_prefetch(line, 0, 2);
    }
    FS_TILE_ZERO(0);
    FS_TILE_ZERO(1);
    FS_TILE_ZERO(2);
    FS_TILE_ZERO(3);
    for (int64_t step = 0; step < depth; step += kPairDepth) {
      const float* b = panel + step / 2 * kPanel;
      FS_TILE_LOAD(4, here + step, stride);
      FS_TILE_LOAD(5, here + 16 * a_row + step, stride);
      FS_TILE_LOAD(6, b, kPanel * 4);
      FS_TILE_LOAD(7, b + 16, kPanel * 4);
      FS_TILE_DOT(0, 4, 6);
      FS_TILE_DOT(1, 4, 7);
      FS_TILE_DOT(2, 5, 6);
      FS_TILE_DOT(3, 5, 7);
    }
    FS_TILE_STORE(0, sums, kPanel * 4);
    FS_TILE_STORE(1, sums + 16, kPanel * 4);
    FS_TILE_STORE(2, sums + 16 * kPanel, kPanel * 4);
    FS_TILE_STORE(3, sums + 16 * kPanel + 16, kPanel * 4);
    asm volatile("" : : "r"(sums) : "memory");
    if (row) finish_at(row - kPairRows);
  }
  if (row) finish_at(row - kPairRows);
}

#else

inline void tile_setup() {}
inline void tile_done() {}

inline Vec dot_pairs(Vec sum, Words a, Vec b) {
#if defined(FS_EMULATED)
  // A pair's halves: the low one is the first.
  const Words w = (Words)b, high = Words{} + 0xffff0000u;
  sum += (Vec)(a << 16) * (Vec)(w << 16);
  return sum + (Vec)(a & high) * (Vec)(w & high);
#else
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
}

template <int Rows, int Vectors, class Finish>
inline void tile_pairs(int64_t row, int64_t depth, const Bf16* a, int64_t a_row, const float* panel,
                       Finish& finish, Ahead& ahead) {
  Vec sum[Rows][Vectors] = {};
  a += row * a_row;
  const char* line = nullptr;
  int64_t lines = ahead.next(depth / 2, line);
  for (int64_t step = 0; step < depth; step += 2, panel += kPanel) {
    if (lines-- > 0) {
      __builtin_prefetch(line, 0, 2);
      line += 64;
    }
    Vec b[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, a + r * a_row + step, sizeof(pair));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = dot_pairs(sum[r][v], Words{} + pair, b[v]);
    }
  }
  finish.template tile<Rows, Vectors>(row, sum);
}

template <int Vectors, class Finish>
inline void pairs_of(int64_t rows, int64_t depth, const Bf16* a, int64_t a_row, const float* panel,
                     Finish& finish, Ahead& ahead) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    tile_pairs<kTileRows, Vectors>(row, depth, a, a_row, panel, finish, ahead);
  }
  for (; row + kFewRows <= rows; row += kFewRows) {
    tile_pairs<kFewRows, Vectors>(row, depth, a, a_row, panel, finish, ahead);
  }
  for (; row < rows; ++row) tile_pairs<1, Vectors>(row, depth, a, a_row, panel, finish, ahead);
}

template <class Finish>
inline void pairs_product(int64_t rows, int64_t k, const Bf16* a, int64_t a_row, const float* panel,
                          int columns, Finish& finish, Ahead& ahead) {
  if (columns > kLanes) {
    pairs_of<kTileVectors>(rows, pair_depth(k), a, a_row, panel, finish, ahead);
  } else {
    pairs_of<1>(rows, pair_depth(k), a, a_row, panel, finish, ahead);
  }
}

#endif

// The table of one instruction set. Included last, inside its anonymous namespace.

int64_t packed_product(int64_t k, int64_t columns, Element element) {
#if defined(FS_PAIRS)
  if (element == kBfloat16) return packed_pairs_size(k, columns);
#endif
  (void)element;
  return packed_size(k, columns);
}

// Weights [out][in][taps] as columns of outputs over rows of [tap][in], or, for the gradient of x,
// the other way round.
void pack_product(const float* weight, int64_t out, int64_t in, int kernel, bool forward,
                  Element element, float* to) {
  const int64_t taps = int64_t{kernel} * kernel, depth = in * taps;
#if defined(FS_PAIRS)
  if (element == kBfloat16) {
    const int64_t k = forward ? depth : out, columns = forward ? out : depth;
    if (taps == 1) {
      for (int64_t column = 0; column < columns; column += kPanel, to += pair_depth(k) / 2 * kPanel) {
        const int count = columns - column < kPanel ? static_cast<int>(columns - column) : kPanel;
        if (forward) {
          pack_pairs_of_rows(weight + column * in, in, k, count, to);
        } else {
          pack_pairs(weight + column, in, k, count, to, pair_depth(k) / 2);
        }
      }
      return;
    }
    alignas(64) float two[2 * kPanel];
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int count = columns - column < kPanel ? static_cast<int>(columns - column) : kPanel;
      for (int64_t row = 0; row < pair_depth(k); row += 2, to += kPanel) {
        for (int i = 0; i < 2 * kPanel; ++i) {
          const int64_t at = row + i / kPanel, c = column + i % kPanel;
          const int64_t o = forward ? c : at, d = forward ? at : c;
          const bool there = at < k && c < columns;
          two[i] = there ? weight[(o * in + d % in) * taps + d / in] : 0.0f;
        }
        pack_pairs(two, kPanel, 2, count, to, 1);
      }
    }
    return;
  }
#endif
  (void)element;
  if (taps == 1) {
    pack(weight, forward ? 1 : in, forward ? in : 1, forward ? in : out, forward ? out : in, to);
    return;
  }
  const int64_t rows = forward ? depth : out, columns = forward ? out : depth;
  for (int64_t column = 0; column < round_up(columns, kPanel); ++column) {
    float* panel = to + column / kPanel * rows * kPanel + column % kPanel;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t o = forward ? column : row, k = forward ? row : column;
      panel[row * kPanel] = column < columns ? weight[(o * in + k % in) * taps + k / in] : 0.0f;
    }
  }
}

int64_t packed_depthwise(int64_t channels, int kernel) {
  return round_up(channels, kLanes) * kernel * kernel;
}

// [channels][taps] into vectors of channels, tap by tap; the taps backwards for the gradient of x.
void pack_depthwise(const float* weight, int64_t channels, int kernel, bool forward, float* to) {
  const int taps = kernel * kernel;
  for (int64_t c = 0; c < round_up(channels, kLanes); ++c) {
    float* lane = to + c / kLanes * taps * kLanes + c % kLanes;
    for (int tap = 0; tap < taps; ++tap) {
      lane[tap * kLanes] =
          c < channels ? weight[c * taps + (forward ? tap : taps - 1 - tap)] : 0.0f;
    }
  }
}

int64_t scratch(const Geometry& g, bool depthwise) {
  return depthwise ? depthwise_scratch(g) : product_scratch(g);
}

int64_t expanding_scratch(const Geometry& g, const Geometry& before) {
  return round_up(depthwise_scratch(g), 16) + expanding_room(before, kBackwardGroup * kLanes);
}

void outer(int64_t rows, int64_t m, int64_t n, const float* left, int64_t left_row,
           const float* right, int64_t right_row, float* to, int64_t to_row) {
  Ahead none;
  outer_product(rows, m, n, left, left_row, right, right_row, to, to_row, true, none);
}

// With products of their own for bfloat16 alone, the float32 kernels are another level's (isa.cpp).
#if defined(FS_PAIRS)
#define FS_BOTH(kernel) {nullptr, kernel<Bf16>}
#else
#define FS_BOTH(kernel) {kernel<float>, kernel<Bf16>}
#endif

const Kernels kTable = {packed_product,
                        pack_product,
                        packed_depthwise,
                        pack_depthwise,
                        scratch,
                        expanding_scratch,
                        add,
                        outer,
                        FS_BOTH(product_forward),
                        FS_BOTH(depthwise_forward),
                        FS_BOTH(product_backward),
                        FS_BOTH(depthwise_backward),
                        FS_BOTH(correct),
                        FS_BOTH(centre),
                        FS_BOTH(apply),
                        FS_BOTH(reduce)};

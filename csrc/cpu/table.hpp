// The table of one instruction set. Included last, inside its anonymous namespace.

int64_t packed_pointwise(int64_t k, int64_t columns) { return packed_size(k, columns); }

void pack_pointwise(const float* weight, int64_t out, int64_t in, bool forward, float* to) {
  if (forward) {
    pack(weight, 1, in, in, out, to);
  } else {
    pack(weight, in, 1, out, in, to);
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
  if (depthwise) return depthwise_scratch(g);
  return chunk_rows(g) * (g.out_channels + 2 * g.in_channels + kPanel);
}

const Kernels kTable = {FS_NAME,           kLanes,           packed_pointwise, pack_pointwise,
                        packed_depthwise,  pack_depthwise,   scratch,          pointwise_forward,
                        depthwise_forward, pointwise_backward, depthwise_backward, apply,
                        reduce};

// A vector of kLanes floats. Included once per instruction set, inside its anonymous namespace,
// with FS_LANES defined; built on the compiler's vector extension, so it compiles for any machine.

constexpr int kLanes = FS_LANES;

typedef float Vec __attribute__((vector_size(4 * FS_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * FS_LANES), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<UnalignedVec*>(to) = value; }
inline Vec splat(float value) { return value - Vec{}; }

// The first `count` lanes, in [1, kLanes]; the others are zero and their memory is not touched.
inline Vec load_part(const float* from, int count) {
#if FS_LANES == 16
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), from);
#else
  Vec value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
#endif
}

inline void store_part(float* to, Vec value, int count) {
#if FS_LANES == 16
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1u), (__m512)value);
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

inline Vec load_some(const float* from, int count) {
  return count >= kLanes ? load(from) : load_part(from, count);
}
inline void store_some(float* to, Vec value, int count) {
  if (count >= kLanes) {
    store(to, value);
  } else {
    store_part(to, value, count);
  }
}

// NaN stays NaN, as in torch.
inline Vec relu(Vec x) { return x < 0.0f ? Vec{} : x; }
// `gradient` where the activation was not cut off.
inline Vec keep_positive(Vec gradient, Vec activation) {
  return activation <= 0.0f ? Vec{} : gradient;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline int lanes_left(int64_t total, int64_t done) {
  return total - done < kLanes ? static_cast<int>(total - done) : kLanes;
}

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

// bfloat16 is storage: it widens to float when read and is rounded to the nearest, ties to even, when
// written. NaN stays NaN.
typedef uint16_t Halves __attribute__((vector_size(2 * FS_LANES)));
typedef uint16_t UnalignedHalves
    __attribute__((vector_size(2 * FS_LANES), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * FS_LANES)));

inline Words words_of(Halves x) {
#if FS_LANES == 16
  // __builtin_convertvector would make two halves, and join them.
  return (Words)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, (__m256i)x);
#else
  return __builtin_convertvector(x, Words);
#endif
}
inline Vec widen(Halves x) { return (Vec)(words_of(x) << 16); }
inline Halves narrow(Vec x) {
#if defined(FS_BF16)
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#elif FS_LANES == 16
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words value = x == x ? rounded : Words{} + 0x7fc0;
  return (Halves)_mm512_maskz_cvtepi32_epi16((__mmask16)-1, (__m512i)value);
#else
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, Halves);
#endif
}

inline Vec load(const Bf16* from) { return widen(*reinterpret_cast<const UnalignedHalves*>(from)); }
inline void store(Bf16* to, Vec value) {
  *reinterpret_cast<UnalignedHalves*>(to) = narrow(value);
}

inline Vec load_part(const Bf16* from, int count) {
#if FS_LANES == 16
  return widen((Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1u), from));
#else
  Halves value = {};
  for (int lane = 0; lane < count; ++lane) value[lane] = from[lane].bits;
  return widen(value);
#endif
}

inline void store_part(Bf16* to, Vec value, int count) {
#if FS_LANES == 16
  _mm256_mask_storeu_epi16(to, (__mmask16)((1u << count) - 1u), (__m256i)narrow(value));
#else
  const Halves halves = narrow(value);
  for (int lane = 0; lane < count; ++lane) to[lane].bits = halves[lane];
#endif
}

// What a value is once it has been stored as a T.
template <class T>
inline Vec stored(Vec value) {
  return value;
}
template <>
inline Vec stored<Bf16>(Vec value) {
  return widen(narrow(value));
}

template <class T>
inline Vec load_some(const T* from, int count) {
  return count >= kLanes ? load(from) : load_part(from, count);
}
template <class T>
inline void store_some(T* to, Vec value, int count) {
  if (count >= kLanes) {
    store(to, value);
  } else {
    store_part(to, value, count);
  }
}

// One value.
inline float value_of(float x) { return x; }
inline float value_of(Bf16 x) { return widen(Halves{} + x.bits)[0]; }
inline void set_value(float* to, float value) { *to = value; }
inline void set_value(Bf16* to, float value) { to->bits = narrow(splat(value))[0]; }

// Every second value of a row, from[0], from[2] and so on; nothing beyond the last is touched.
#if defined(__GNUC__) && !defined(__clang__)
typedef int32_t Lanes __attribute__((vector_size(4 * FS_LANES)));

template <class T>
inline Vec load_alternate(const T* from) {
  Lanes lanes = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < kLanes / 2 ? 2 * i : 2 * i + 1;
  return __builtin_shuffle(load(from), load(from + kLanes - 1), lanes);
}

template <class T>
inline void store_alternate(T* to, Vec value) {
  // Lanes of (what is there, value), for either half.
  Lanes low = {}, high = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i % 2 ? i : kLanes + i / 2;
    high[i] = i % 2 ? kLanes + kLanes / 2 + i / 2 : i;
  }
  store(to, __builtin_shuffle(load(to), value, low));
  store(to + kLanes - 1, __builtin_shuffle(load(to + kLanes - 1), value, high));
}

// Rows of a square of values become its columns.
inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Lanes low = {}, high = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & step ? kLanes + i - step : i;
      high[i] = i & step ? kLanes + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Vec first = rows[i], second = rows[i + step];
      rows[i] = __builtin_shuffle(first, second, low);
      rows[i + step] = __builtin_shuffle(first, second, high);
    }
  }
}
#else
inline void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float value = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = value;
    }
  }
}

template <class T>
inline Vec load_alternate(const T* from) {
  Vec value = {};
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = value_of(from[2 * lane]);
  return value;
}

template <class T>
inline void store_alternate(T* to, Vec value) {
  for (int lane = 0; lane < kLanes; ++lane) set_value(to + 2 * lane, value[lane]);
}
#endif

// NaN stays NaN, as in torch.
inline Vec at_least(Vec least, Vec x) {
#if FS_LANES == 16
  return (Vec)_mm512_maskz_max_ps((__mmask16)-1, (__m512)least, (__m512)x);  // x if one is NaN
#else
  return x < least ? least : x;
#endif
}
inline Vec relu(Vec x) { return at_least(Vec{}, x); }
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

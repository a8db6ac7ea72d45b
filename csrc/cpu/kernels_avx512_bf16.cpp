#if defined(__x86_64__) && !defined(__clang__) && __GNUC__ >= 11
#include <immintrin.h>

#include <cstdint>

#include "kernels.hpp"

#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,avx512bf16")
#define FS_LANES 16
#define FS_BF16
#define FS_PAIRS
#define FS_TABLE kernels_avx512_bf16
#include "kernels_body.hpp"

#endif

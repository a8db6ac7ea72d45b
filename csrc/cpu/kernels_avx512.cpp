#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <cstdint>

#include "kernels.hpp"

#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FS_LANES 16
#define FS_TABLE kernels_avx512
#include "kernels_body.hpp"

#endif

#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <cstdint>

#include "kernels.hpp"

#pragma GCC target("avx2,fma")
#define FS_LANES 8
#define FS_TABLE kernels_avx2
#include "kernels_body.hpp"

#endif

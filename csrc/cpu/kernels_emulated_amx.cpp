#if defined(FS_EMULATE) && defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <cstdint>

#include "kernels.hpp"

#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FS_LANES 16
#define FS_PAIRS
#define FS_AMX
#define FS_EMULATED
#define FS_TABLE kernels_emulated_amx
#include "kernels_body.hpp"

#endif

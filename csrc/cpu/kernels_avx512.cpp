#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#include <cstdint>

#include "kernels.hpp"

#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FS_LANES 16
#define FS_NAME "avx512"

namespace fastshift::cpu {
namespace {
#include "vector.hpp"
#include "gemm.hpp"
#include "rows.hpp"
#include "product.hpp"
#include "depthwise.hpp"
#include "table.hpp"
}  // namespace

const Kernels* kernels_avx512() { return &kTable; }
}  // namespace fastshift::cpu

#endif

#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#include <cstdint>

#include "kernels.hpp"

#pragma GCC target("avx2,fma")
#define FS_LANES 8

namespace fastshift::cpu {
namespace {
#include "vector.hpp"
#include "gemm.hpp"
#include "rows.hpp"
#include "epilogues.hpp"
#include "product.hpp"
#include "expanding.hpp"
#include "depthwise.hpp"
#include "table.hpp"
}  // namespace

const Kernels* kernels_avx2() { return &kTable; }
}  // namespace fastshift::cpu

#endif

#if defined(FS_EMULATE) && defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#include <cstdint>

#include "kernels.hpp"

#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#define FS_LANES 16
#define FS_PAIRS
#define FS_EMULATED

namespace fastshift::cpu {
namespace {
#include "vector.hpp"
#include "gemm.hpp"
#include "rows.hpp"
#include "pairs.hpp"
#include "epilogues.hpp"
#include "product.hpp"
#include "expanding.hpp"
#include "depthwise.hpp"
#include "table.hpp"
}  // namespace

const Kernels* kernels_emulated_pairs() { return &kTable; }
}  // namespace fastshift::cpu

#endif

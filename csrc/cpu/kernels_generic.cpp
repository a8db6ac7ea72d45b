
#include <cstdint>

#include "kernels.hpp"

#define FS_LANES 4
#define FS_NAME "generic"

namespace fastshift::cpu {
namespace {
#include "vector.hpp"
#include "gemm.hpp"
#include "rows.hpp"
#include "product.hpp"
#include "depthwise.hpp"
#include "table.hpp"
}  // namespace

const Kernels* kernels_generic() { return &kTable; }
}  // namespace fastshift::cpu



#include <cstdint>

#include "kernels.hpp"

#define FS_LANES 4

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

const Kernels* kernels_generic() { return &kTable; }
}  // namespace fastshift::cpu


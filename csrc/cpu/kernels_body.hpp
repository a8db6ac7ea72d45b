// All kernels of one instruction set, given out by FS_TABLE: no inline function is shared between
// two of them. Included once per instruction set, after its target and its macros.

namespace fastshift::cpu {
namespace {
#include "vector.hpp"
#include "gemm.hpp"
#include "rows.hpp"
#if defined(FS_PAIRS)
#include "pairs.hpp"
#endif
#include "epilogues.hpp"
#include "product.hpp"
#include "expanding.hpp"
#include "depthwise.hpp"
#include "table.hpp"
}  // namespace

const Kernels* FS_TABLE() { return &kTable; }
}  // namespace fastshift::cpu

#include "isa.hpp"

// Kernels for one instruction set take GCC's pragma; of other compilers the generic ones are built.
#if defined(__x86_64__) && !defined(__clang__)
#define FS_X86 1
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastshift::cpu {

const Kernels* kernels_generic();
#if FS_X86
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#define FS_HAS_PAIRS (__GNUC__ >= 11)
#if FS_HAS_PAIRS
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
#endif
#if defined(FS_EMULATE)
const Kernels* kernels_emulated_pairs();
const Kernels* kernels_emulated_amx();
#endif
#endif

namespace {

#if FS_X86
// The compiler wants each name as a literal.
#define FS_NEEDS(feature) \
  if (!__builtin_cpu_supports(feature)) return "this machine lacks " feature

std::string without_avx512() {
  FS_NEEDS("avx512f");
  FS_NEEDS("avx512dq");
  FS_NEEDS("avx512bw");
  FS_NEEDS("avx512vl");
  return "";
}

#if FS_HAS_PAIRS
std::string without_avx512_bf16() {
  const std::string reason = without_avx512();
  if (!reason.empty()) return reason;
  FS_NEEDS("avx512bf16");
  return "";
}

// What __builtin_cpu_supports does not name in every compiler: leaf 7.
std::string without_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d);
  if (!known || !(d >> 22 & 1)) return "this machine lacks amx-bf16";
  if (!(d >> 24 & 1)) return "this machine lacks amx-tile";
  const std::string reason = without_avx512_bf16();
  if (!reason.empty()) return reason;
#if defined(__linux__)
  // Linux hands out the tiles on request, to the threads of a process that asked.
  constexpr long kRequest = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequest, kTileData) != 0) return "the system refuses amx";
  return "";
#else
  return "not asked for on this system";
#endif
}
#endif

std::string without_avx2() {
  FS_NEEDS("avx2");
  FS_NEEDS("fma");
  return "";
}
#endif

#if FS_X86 && (FS_HAS_PAIRS || defined(FS_EMULATE))
// A table that has kernels for bfloat16 alone, with AVX-512's for float32: those are compiled once.
Kernels with_float32(const Kernels& own) {
  Kernels table = own;
  const Kernels& other = *kernels_avx512();
  table.product_forward[kFloat32] = other.product_forward[kFloat32];
  table.depthwise_forward[kFloat32] = other.depthwise_forward[kFloat32];
  table.product_backward[kFloat32] = other.product_backward[kFloat32];
  table.depthwise_backward[kFloat32] = other.depthwise_backward[kFloat32];
  table.correct[kFloat32] = other.correct[kFloat32];
  table.centre[kFloat32] = other.centre[kFloat32];
  table.apply[kFloat32] = other.apply[kFloat32];
  table.reduce[kFloat32] = other.reduce[kFloat32];
  return table;
}
#endif

}  // namespace

std::vector<Level> levels() {
  std::vector<Level> found;
#if FS_X86
  __builtin_cpu_init();
#if FS_HAS_PAIRS
  static const Kernels amx = with_float32(*kernels_amx());
  static const Kernels avx512_bf16 = with_float32(*kernels_avx512_bf16());
  found.push_back({"amx", without_amx(), &amx});
  found.push_back({"avx512_bf16", without_avx512_bf16(), &avx512_bf16});
#else
  for (const char* name : {"amx", "avx512_bf16"}) {
    found.push_back({name, "the compiler of this build lacks it", nullptr});
  }
#endif
  found.push_back({"avx512", without_avx512(), kernels_avx512()});
  found.push_back({"avx2", without_avx2(), kernels_avx2()});
#else
  for (const char* name : {"amx", "avx512_bf16", "avx512", "avx2"}) {
#if defined(__x86_64__)
    found.push_back({name, "the compiler of this build lacks it", nullptr});
#else
    found.push_back({name, "this machine is not an x86-64", nullptr});
#endif
  }
#endif
  found.push_back({"generic", "", kernels_generic()});
#if defined(FS_EMULATE) && FS_X86
  // For tests, on machines without the instructions.
  static const Kernels emulated_pairs = with_float32(*kernels_emulated_pairs());
  static const Kernels emulated_amx = with_float32(*kernels_emulated_amx());
  found.push_back({"emulated_avx512_bf16", without_avx512(), &emulated_pairs});
  found.push_back({"emulated_amx", without_avx512(), &emulated_amx});
#endif
  for (Level& level : found) {
    if (!level.reason.empty()) level.kernels = nullptr;
  }
  return found;
}

}  // namespace fastshift::cpu

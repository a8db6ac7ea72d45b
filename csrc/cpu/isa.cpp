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

}  // namespace

std::vector<Level> levels() {
  std::vector<Level> found;
#if FS_X86
  __builtin_cpu_init();
#if FS_HAS_PAIRS
  found.push_back({"amx", without_amx(), kernels_amx()});
  found.push_back({"avx512_bf16", without_avx512_bf16(), kernels_avx512_bf16()});
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
  found.push_back({"emulated_avx512_bf16", without_avx512(), kernels_emulated_pairs()});
  found.push_back({"emulated_amx", without_avx512(), kernels_emulated_amx()});
#endif
  for (Level& level : found) {
    if (!level.reason.empty()) level.kernels = nullptr;
  }
  return found;
}

}  // namespace fastshift::cpu

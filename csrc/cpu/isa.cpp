#include "isa.hpp"

namespace fastshift::cpu {

const Kernels* kernels_generic();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#endif

namespace {

#if defined(__x86_64__)
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

std::string without_avx2() {
  FS_NEEDS("avx2");
  FS_NEEDS("fma");
  return "";
}
#endif

}  // namespace

std::vector<Level> levels() {
  std::vector<Level> found{{"amx", "not part of this version", nullptr}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  found.push_back({"avx512", without_avx512(), kernels_avx512()});
  found.push_back({"avx2", without_avx2(), kernels_avx2()});
#else
  for (const char* name : {"avx512", "avx2"}) {
    found.push_back({name, "this machine is not an x86-64", nullptr});
  }
#endif
  found.push_back({"generic", "", kernels_generic()});
  for (Level& level : found) {
    if (!level.reason.empty()) level.kernels = nullptr;
  }
  return found;
}

}  // namespace fastshift::cpu

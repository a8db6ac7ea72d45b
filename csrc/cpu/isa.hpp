// Which instruction sets this build holds and this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastshift::cpu {

struct Level {
  std::string name;
  std::string reason;      // why it cannot run here; empty where it can
  const Kernels* kernels;  // null where it cannot
};

// Every level, best first.
std::vector<Level> levels();

}  // namespace fastshift::cpu

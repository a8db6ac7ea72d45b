// Which instruction sets this build holds and this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace fastshift::cpu {

// Best first; every one of them can run here.
std::vector<const Kernels*> available_kernels();

}  // namespace fastshift::cpu

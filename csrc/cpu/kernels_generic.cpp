#include <cstdint>

#include "kernels.hpp"

#define FS_LANES 4
#define FS_TABLE kernels_generic
#include "kernels_body.hpp"


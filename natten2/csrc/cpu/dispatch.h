// The kernels of the instruction set in use.
#pragma once

#include "problem.h"

namespace natten2::cpu {

Kernels kernels(Dtype dtype, const Problem& problem);

}  // namespace natten2::cpu

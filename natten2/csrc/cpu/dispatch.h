// The kernels of the instruction set in use.
#pragma once

#include "problem.h"
#include "unfused_problem.h"

namespace natten2::cpu {

Kernels kernels(Dtype dtype, const Problem& problem);
UnfusedKernels unfused_kernels(Dtype dtype);

}  // namespace natten2::cpu

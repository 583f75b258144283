// The CUDA kernels and their bindings on the host, for tests/emulated.py.
#include "bind_cuda.cpp"
#include "cuda/launch.h"

// Whether the last warp runs first, and the last lane of each.
extern "C" __attribute__((visibility("default"))) void natten2_reverse_emulation(bool is_reversed) {
  natten2::cuda::Emulation::get().is_reversed = is_reversed;
}

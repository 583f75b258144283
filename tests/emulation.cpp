// The CUDA kernels on the host, for tests/emulated.py.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "launch.h"

namespace {

std::string reason;

template <class Run>
const char* report(bool is_reversed, const Run& run) {
  natten2::cuda::Emulation::get().is_reversed = is_reversed;
  try {
    return run();
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}

}  // namespace

extern "C" {

// Null, or what went wrong. `is_reversed` runs the last warp and the last lane first.
const char* emulate_forward(int dtype, int channels, const natten2::cuda::Forward* args, bool is_reversed) {
  const auto kernels = natten2::cuda::find_kernels(static_cast<natten2::cuda::Dtype>(dtype), channels);
  return report(is_reversed, [&] { return kernels.forward(*args, nullptr); });
}

const char* emulate_backward(int dtype, int channels, const natten2::cuda::Backward* args, bool is_reversed) {
  const auto kernels = natten2::cuda::find_kernels(static_cast<natten2::cuda::Dtype>(dtype), channels);
  return report(is_reversed, [&] { return kernels.backward(*args, nullptr); });
}
}

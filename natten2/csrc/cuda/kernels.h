// The kernels that there are: by dtype, and by how many channels they are made for. kernels.cu is compiled once for
// each.
#pragma once

#include "problem.h"

namespace natten2::cuda {

struct Half;
struct BFloat16;
struct Float;

enum class Dtype : int32_t { kHalf, kBFloat16, kFloat };

template <class Number, int kChannels>
Failure run_forward(const Forward& args, void* stream);

template <class Number, int kChannels>
Failure run_backward(const Backward& args, void* stream);

struct Kernels {
  Failure (*forward)(const Forward& args, void* stream);
  Failure (*backward)(const Backward& args, void* stream);
};

template <class Number, int kChannels>
Kernels kernels_of() {
  return {run_forward<Number, kChannels>, run_backward<Number, kChannels>};
}

template <class Number>
Kernels half_kernels(int channels) {
  if (channels <= 32) return kernels_of<Number, 32>();
  if (channels <= 64) return kernels_of<Number, 64>();
  if (channels <= 128) return kernels_of<Number, 128>();
  return channels <= 256 ? kernels_of<Number, 256>() : Kernels{};
}

// Those for the smallest number of channels that suffices, or null pointers.
inline Kernels find_kernels(Dtype dtype, int channels) {
  switch (dtype) {
    case Dtype::kHalf:
      return half_kernels<Half>(channels);
    case Dtype::kBFloat16:
      return half_kernels<BFloat16>(channels);
    case Dtype::kFloat:
      // A row of more channels would leave too little shared memory to its partners.
      if (channels <= 32) return kernels_of<Float, 32>();
      if (channels <= 64) return kernels_of<Float, 64>();
      if (channels <= 128) return kernels_of<Float, 128>();
  }
  return {};
}

}  // namespace natten2::cuda

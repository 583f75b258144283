// Instantiates the kernels of one instruction set: compiled once for each, with NATTEN2_ISA naming it. The set that
// multiplies bfloat16s in pairs has nothing else of its own: what it lacks is AVX-512's.
#include "backward.h"
#include "forward.h"
#include "path.h"
#include "stencil_passes.h"

namespace natten2::cpu {

#ifdef NATTEN2_PAIRS
namespace avx512 {
Kernels kernels(Dtype, const Problem&);
}
#endif

inline namespace NATTEN2_ISA {
namespace {

template <class Arguments, class Implementation>
constexpr Pass<Arguments> pass() {
  return {Implementation::count, Implementation::work, Implementation::scratch_bytes, Implementation::run};
}

template <class Storage>
Kernels gather() {
  // The first writes delta, which the others read.
  static constexpr Pass<Backward> kBackward[] = {pass<Backward, GradQueryPass<Storage>>(),
                                                 pass<Backward, GradKeyValuePass<Storage>>(),
                                                 pass<Backward, GradAdditionalPass<Storage>>()};
  return {pass<Forward, ForwardPass<Storage>>(), kBackward, 3, GradQueryPass<Storage>::parts};
}

template <class Storage>
Kernels stencil() {
  static constexpr Pass<Backward> kBackward[] = {pass<Backward, StencilBackwardPass<Storage>>()};
  return {pass<Forward, StencilForwardPass<Storage>>(), kBackward, 1, StencilBackwardPass<Storage>::parts};
}

template <class Storage>
Kernels choose(const Problem& problem) {
  switch (path(problem)) {
    case Path::kStencil:
      return stencil<Storage>();
    default:
      return gather<Storage>();
  }
}

}  // namespace

Kernels kernels(Dtype dtype, const Problem& problem) {
#ifdef NATTEN2_PAIRS
  const bool has_pairs = dtype == Dtype::kBFloat16 && path(problem) == Path::kStencil;
  return has_pairs ? stencil<BFloat16>() : avx512::kernels(dtype, problem);
#else
  switch (dtype) {
    case Dtype::kDouble:
      return gather<double>();
    case Dtype::kBFloat16:
      return choose<BFloat16>(problem);
    case Dtype::kHalf:
      return choose<Half>(problem);
    default:
      return choose<float>(problem);
  }
#endif
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

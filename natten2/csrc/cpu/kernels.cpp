// Instantiates the kernels of one instruction set: compiled once for each, with NATTEN2_ISA naming it.
#include "backward.h"
#include "forward.h"
#include "path.h"
#include "stencil_forward.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {
namespace {

template <class Arguments, class Implementation>
constexpr Pass<Arguments> pass() {
  return {Implementation::count, Implementation::work, Implementation::scratch_bytes, Implementation::run};
}

template <class Storage>
constexpr Kernels gather() {
  return {pass<Forward, ForwardPass<Storage>>(), pass<Backward, GradQueryPass<Storage>>(),
          pass<Backward, GradKeyValuePass<Storage>>(), pass<Backward, GradAdditionalPass<Storage>>()};
}

template <class Storage>
Kernels instance(const Problem& problem) {
  Kernels kernels = gather<Storage>();
  if (path(problem) == Path::kStencil) kernels.forward = pass<Forward, StencilForwardPass<Storage>>();
  return kernels;
}

}  // namespace

Kernels kernels(Dtype dtype, const Problem& problem) {
  switch (dtype) {
    case Dtype::kDouble:
      return gather<double>();
    case Dtype::kBFloat16:
      return instance<BFloat16>(problem);
    case Dtype::kHalf:
      return instance<Half>(problem);
    default:
      return instance<float>(problem);
  }
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// Instantiates the kernels of one instruction set: compiled once for each, with NATTEN2_ISA naming it.
#include "backward.h"
#include "forward.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {
namespace {

template <class Arguments, class Implementation>
constexpr Pass<Arguments> pass() {
  return {Implementation::count, Implementation::work, Implementation::scratch_bytes, Implementation::run};
}

template <class Storage>
constexpr Kernels instance() {
  return {pass<Forward, ForwardPass<Storage>>(), pass<Backward, GradQueryPass<Storage>>(),
          pass<Backward, GradKeyValuePass<Storage>>(), pass<Backward, GradAdditionalPass<Storage>>()};
}

}  // namespace

Kernels kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return instance<double>();
    case Dtype::kBFloat16:
      return instance<BFloat16>();
    case Dtype::kHalf:
      return instance<Half>();
    default:
      return instance<float>();
  }
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

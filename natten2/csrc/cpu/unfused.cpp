// Instantiates the unfused kernels of one instruction set: compiled once for each, with NATTEN2_ISA naming it.
#include "unfused.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {
namespace {

template <class Implementation>
constexpr Pass<Unfused> pass() {
  return {Implementation::count, Implementation::work, Implementation::scratch_bytes, Implementation::run};
}

template <class Storage>
constexpr UnfusedKernels all() {
  return {pass<ScorePass<Storage>>(),         pass<SumPass<Storage>>(),    pass<TransposedSumPass<Storage>>(),
          pass<AdditionalSumPass<Storage>>(), pass<OffsetPass<Storage>>(), OffsetPass<Storage>::parts};
}

}  // namespace

UnfusedKernels unfused_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::kDouble:
      return all<double>();
    case Dtype::kBFloat16:
      return all<BFloat16>();
    case Dtype::kHalf:
      return all<Half>();
    default:
      return all<float>();
  }
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

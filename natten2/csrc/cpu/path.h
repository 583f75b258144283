// Which kernels run: the one place that decides.
#pragma once

#include "stencil_plan.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

enum class Path { kStencil, kGather };

// For every storage type but float64, which is always gathered. docs/architecture.md says what the paths are.
inline Path path(const Problem& problem) {
  constexpr int64_t kFewestKeys = 4, kMostKeys = 512, kMostChannels = 256;
  const int64_t keys = most_found<Seek::kKeys>(problem);
  if (problem.additional > 0 || keys < kFewestKeys || keys > kMostKeys) return Path::kGather;
  if (larger(problem.head_dim, problem.value_dim) > kMostChannels) return Path::kGather;
  // Each head's bias is written out for every block of a sheet.
  constexpr int64_t kMostBiasEntries = int64_t{1} << 15;
  if (group_size(problem) * offsets(problem) > kMostBiasEntries) return Path::kGather;
  // Of short rows, too few may stand side by side to be worth whole vectors.
  const int64_t columns = problem.key_heads * problem.axes[2].length;
  return 2 * columns >= kLanes ? Path::kStencil : Path::kGather;
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// The CUDA kernels and their bindings on the host, for tests/emulated.py.
#include <random>

#include "bind_cuda.cpp"
#include "cuda/launch.h"

namespace natten2::cuda {
namespace {

// Any problem that the rule of natten2/ops/cuda_kernels.py allows.
template <class Random>
Problem any_problem(const Random& random) {
  constexpr int kLongest[] = {5000, 300, 60}, kWidest[] = {1023, 60, 20};
  Problem problem = {};
  std::fill(std::begin(problem.axes), std::end(problem.axes), BasicAxis<int32_t>{1, 1, 1, 1, false});
  const int rank = random(1, kAxes);
  for (int i = kAxes - rank; i < kAxes; ++i) {
    auto& axis = problem.axes[i];
    axis.length = random(1, kLongest[rank - 1]);
    axis.kernel_size = random(1, std::min(axis.length, kWidest[rank - 1]));
    axis.dilation = random(0, 1) ? 1 : random(1, axis.length / axis.kernel_size);
    axis.stride = random(0, 1) ? 1 : random(1, axis.kernel_size);
    axis.is_causal = random(0, 1);
  }
  problem.batch = random(1, 4);
  problem.key_heads = random(1, 4);
  problem.heads = problem.key_heads * random(1, 4);
  problem.additional = random(0, 2) ? 0 : random(1, 3000);
  return problem;
}

bool is_right(const Problem& problem, const Traits& traits) {
  Plan plan;
  if (!make_plan(problem, traits, plan)) return false;
  const Layout layout = make_layout(plan, traits.row_bytes, traits.owned, traits.numbers);
  const int64_t rows = static_cast<int64_t>(plan.chunk[0]) * plan.chunk[1] * plan.chunk[2];
  // Rows are found by offsets of 16 bits.
  return layout.total <= kMostShared && rows <= plan.chunk_rows && plan.chunk_rows < kMostChunkRows &&
         plan.chunk_rows * traits.row_bytes <= 1 << 16 &&
         *std::max_element(plan.chunk, plan.chunk + kAxes) <= kMostChunkSide;
}

}  // namespace
}  // namespace natten2::cuda

extern "C" {

// Whether the last warp runs first, and the last lane of each.
__attribute__((visibility("default"))) void natten2_reverse_emulation(bool is_reversed) {
  natten2::cuda::Emulation::get().is_reversed = is_reversed;
}

// How many plans of random problems don't fit into shared memory, or break a limit.
__attribute__((visibility("default"))) int natten2_wrong_plans(int problems, int most_offsets, int most_of_wide_rows) {
  using namespace natten2::cuda;
  std::mt19937 generator(0);
  const auto random = [&](int first, int last) {
    return first + static_cast<int>(generator() % static_cast<unsigned>(last - first + 1));
  };
  int wrong = 0;
  for (int i = 0; i < problems; ++i) {
    const Problem problem = any_problem(random);
    for (const int row_bytes : {64, 128, 256, 512}) {
      const int offsets =
          offset_count(problem) <= (row_bytes > 256 ? most_of_wide_rows : most_offsets) ? offset_count(problem) : 0;
      wrong += !is_right(problem, {Owner::kQueries, row_bytes, 1, 0, offsets, false});
      wrong += !is_right(problem, {Owner::kQueries, row_bytes, 2, 0, offsets, offsets > 0});
      wrong += !is_right(problem, {Owner::kKeys, row_bytes, 2, 2, offsets, false});
      if (problem.additional) wrong += !is_right(problem, {Owner::kAdditional, row_bytes, 2, 2, 0, false});
    }
  }
  return wrong;
}
}

// Chooses tiles and chunks on the host, from sizes alone: the same problem has the same plan on every device.
#pragma once

#include <algorithm>

#include "pipeline.cuh"

namespace natten2::cuda {

enum class Owner { kQueries, kKeys, kAdditional };

// What every chip from compute capability 8.0 on gives to one block.
constexpr int kMostShared = 99 * 1024;
// So that four blocks, or three, fit on a multiprocessor of an H100.
constexpr int kSharedOfFour = 56 * 1024, kSharedOfThree = 74 * 1024;
constexpr uint32_t kMostBlocks = 0x7fffffff;

struct Traits {
  Owner owner;
  int row_bytes;
  int owned;    // tensors
  int numbers;  // float32 numbers per partner
  int offsets;  // of a bias, or 0
  bool sums_bias;
};

// The most partners along an axis of the tiles with a side, away from borders and at them.
inline int span_of(const BasicAxis<int32_t>& axis, Owner owner, int side) {
  if (owner == Owner::kAdditional) return axis.length;
  constexpr int kSample = 8;
  const int length = group_length(axis, 0), tiles = (length + side - 1) / side;
  int span = 1;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile == kSample && tiles > 2 * kSample) tile = tiles - kSample;
    const int first = tile * side, last = std::min(first + side, length) - 1;
    const bool owns_keys = owner == Owner::kKeys;
    const int begin = (owns_keys ? query_bounds(axis, length, first) : key_bounds(axis, length, first)).begin;
    const int end = (owns_keys ? query_bounds(axis, length, last) : key_bounds(axis, length, last)).end;
    span = std::max(span, end - begin);
  }
  return span;
}

// The boxes, of a warp and of a block, for which a warp computes and a block loads the least.
inline void choose_tiles(const Problem& problem, Owner owner, Plan& plan) {
  constexpr int kWarpPowers = 4, kBlockPowers = 2;
  std::fill(plan.warp_tile, plan.warp_tile + kAxes, 0);
  std::fill(plan.warps, plan.warps + kAxes, 0);
  if (owner == Owner::kAdditional) {
    plan.warp_tile[kAxes - 1] = kWarpPowers;
    plan.warps[kAxes - 1] = kBlockPowers;
    return;
  }
  int spans[kAxes][kWarpPowers + kBlockPowers + 1];
  double tiled[kAxes][kWarpPowers + kBlockPowers + 1];
  for (int axis = 0; axis < kAxes; ++axis)
    for (int power = 0; power <= kWarpPowers + kBlockPowers; ++power) {
      const int side = 1 << power, length = group_length(problem.axes[axis], 0);
      spans[axis][power] = span_of(problem.axes[axis], owner, side);
      tiled[axis][power] = static_cast<double>((length + side - 1) / side * side) / length;
    }
  double least = 0;
  for (int w0 = 0; w0 <= kWarpPowers; ++w0)
    for (int w1 = 0; w0 + w1 <= kWarpPowers; ++w1)
      for (int b0 = 0; b0 <= kBlockPowers; ++b0)
        for (int b1 = 0; b0 + b1 <= kBlockPowers; ++b1) {
          const int warp[kAxes] = {w0, w1, kWarpPowers - w0 - w1}, more[kAxes] = {b0, b1, kBlockPowers - b0 - b1};
          double computed = 1, loaded = 1, waste = 1;
          for (int axis = 0; axis < kAxes; ++axis) {
            computed *= spans[axis][warp[axis]];
            loaded *= spans[axis][warp[axis] + more[axis]];
            waste *= tiled[axis][warp[axis] + more[axis]];
          }
          computed = std::max(1.0, (computed + kRows - 1) / kRows) * kRows;
          // A row that is loaded costs a warp about as much as the pairs of half a row of products.
          const double cost = waste * (computed + loaded / kWarps / 2);
          if (least == 0 || cost < least) {
            least = cost;
            std::copy(warp, warp + kAxes, plan.warp_tile);
            std::copy(more, more + kAxes, plan.warps);
          }
        }
}

// The sides of chunks that cover spans evenly with at most so many rows each.
inline int choose_chunk(const int (&spans)[kAxes], int rows, Plan& plan) {
  int left = std::min(rows, kMostChunkRows - kRows), volume = 1;
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    const int most = std::max(1, std::min(left, kMostChunkSide)), pieces = (spans[axis] + most - 1) / most;
    plan.chunk[axis] = (spans[axis] + pieces - 1) / pieces;
    left /= plan.chunk[axis];
    volume *= plan.chunk[axis];
  }
  return volume;
}

inline int fitting_rows(Plan plan, const Traits& traits, int bytes) {
  plan.chunk_rows = 0;
  const int fixed = make_layout(plan, traits.row_bytes, traits.owned, traits.numbers).total;
  plan.chunk_rows = kRows;
  const int each = make_layout(plan, traits.row_bytes, traits.owned, traits.numbers).total - fixed;
  return bytes < fixed ? 0 : (bytes - fixed) / each * kRows;
}

// Makes a plan, or returns false where no chunk fits into shared memory.
inline bool make_plan(const Problem& problem, const Traits& traits, Plan& plan) {
  plan = {};
  plan.sees_all = traits.owner == Owner::kAdditional;
  plan.offsets = traits.offsets;
  plan.step_parts = 1;
  choose_tiles(problem, traits.owner, plan);
  int spans[kAxes];
  uint64_t items = problem.batch;
  for (int axis = 0; axis < kAxes; ++axis) {
    spans[axis] = span_of(problem.axes[axis], traits.owner, block_side(plan, axis));
    const int along =
        plan.sees_all ? (axis == kAxes - 1 ? problem.additional : 1) : group_length(problem.axes[axis], 0);
    plan.tiles[axis] = static_cast<uint32_t>((along + block_side(plan, axis) - 1) / block_side(plan, axis));
    items *= static_cast<uint64_t>(plan.tiles[axis]) * (plan.sees_all ? 1 : problem.axes[axis].dilation);
  }
  if (items > kMostBlocks) return false;
  plan.items = static_cast<uint32_t>(items);

  const int64_t volume = static_cast<int64_t>(spans[0]) * spans[1] * spans[2];
  const struct {
    int stages, bytes, tables, least;
  } options[] = {
      {1, kSharedOfFour, 4, 0},   {1, kSharedOfFour, 1, 0},       {2, kSharedOfThree, 4, 64},
      {2, kSharedOfThree, 1, 32}, {2, kMostShared, 1, 2 * kRows}, {1, kMostShared, 1, kRows},
  };
  for (const auto& option : options) {
    plan.stages = option.stages;
    plan.grad_tables = traits.sums_bias ? option.tables : 0;
    const int rows = fitting_rows(plan, traits, option.bytes);
    const bool is_whole = volume <= rows && volume <= kMostChunkRows - kRows;
    if (option.least ? rows < option.least && !is_whole : !is_whole) continue;
    const int chunk = choose_chunk(spans, rows, plan);
    plan.chunk_rows = (chunk + kRows - 1) / kRows * kRows;
    // Additional keys come in chunks of this many.
    if (problem.additional && traits.owner == Owner::kQueries)
      plan.chunk_rows = std::max(plan.chunk_rows, std::min(rows, 4 * kRows));
    const bool has_one_chunk =
        traits.owner == Owner::kQueries ? problem.additional == 0 : problem.heads == problem.key_heads;
    if (volume <= chunk && has_one_chunk) plan.stages = 1;
    return true;
  }
  return false;
}

}  // namespace natten2::cuda

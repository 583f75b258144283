// How both directions of the stencil are cut into tasks.
#pragma once

#include "stencil_backward.h"
#include "stencil_forward.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// A task is a sheet, and one row of the first axis.
template <class Storage>
struct StencilForwardPass {
  static constexpr int64_t kTasks = 4;

  static Cut cut(const Forward& args) { return natten2::cpu::cut(args.problem, Visit::kOwned, kTasks); }

  static int64_t count(const Forward& args) {
    const Problem& problem = args.problem;
    const Cut cut = StencilForwardPass::cut(args);
    return cut.chunks * cut.tiles * problem.batch * problem.axes[0].length * problem.axes[1].dilation * cut.strips;
  }

  static int64_t work(const Forward& args) {
    const Problem& problem = args.problem;
    const Cut cut = StencilForwardPass::cut(args);
    return cut.most_queries * cut.rows * group_size(problem) * most_found<Seek::kKeys>(problem) *
           (problem.head_dim + problem.value_dim) / 8;
  }

  static int64_t scratch_bytes(const Forward& args) {
    const Cut cut = StencilForwardPass::cut(args);
    Arena arena(nullptr);
    StencilForward<Storage>(args, cut, arena);
    return arena.used();
  }

  static void run(const Forward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.problem;
    const Cut cut = StencilForwardPass::cut(args);
    Arena arena(scratch);
    StencilForward<Storage> stencil(args, cut, arena);
    for (int64_t task = begin, strips; task < end; task += strips) {
      int64_t rest = task;
      const auto next = [&](int64_t size) {
        const int64_t index = rest % size;
        rest /= size;
        return index;
      };
      const int64_t strip = next(cut.strips), group1 = next(problem.axes[1].dilation);
      const int64_t index0 = next(problem.axes[0].length), batch = next(problem.batch);
      const int64_t tile = next(cut.tiles), chunk = next(cut.chunks);
      const int64_t dilation0 = problem.axes[0].dilation;
      // Those that follow each other as one, so that the keys that both see are loaded once.
      strips = smaller(cut.strips - strip, end - task);
      stencil.run({chunk, tile, batch, index0 % dilation0, group1, strip}, index0 / dilation0, strips);
    }
  }
};

// A task is a share of the sheets of a chunk's tile, which sums the bias's gradient of its own.
template <class Storage>
struct StencilBackwardPass {
  static Cut cut(const Problem& problem) { return natten2::cpu::cut(problem, Visit::kSeeing, 2); }

  static int64_t sheets(const Problem& problem, const Cut& cut) {
    return problem.batch * problem.axes[0].dilation * problem.axes[1].dilation * cut.strips;
  }

  // The same for any number of threads, so that sums are too.
  static int64_t shares(const Problem& problem, const Cut& cut) {
    constexpr int64_t kTasks = 64, kMostEntries = int64_t{1} << 22;
    const int64_t tiles = cut.chunks * cut.tiles;
    const int64_t fitting =
        kMostEntries / (problem.heads * offsets(problem) * chunks_per_head(problem, cut) * cut.tiles);
    return larger(1, smaller(smaller(fitting, (kTasks + tiles - 1) / tiles), sheets(problem, cut)));
  }

  static int64_t chunks_per_head(const Problem& problem, const Cut& cut) {
    return smaller(cut.chunks, (problem.axes[2].dilation - 1) / cut.lines_together + 2);
  }

  // Of which the gradient of each head's bias is the sum.
  static int64_t parts(const Problem& problem) {
    const Cut cut = StencilBackwardPass::cut(problem);
    return chunks_per_head(problem, cut) * cut.tiles * shares(problem, cut);
  }

  static int64_t count(const Backward& args) {
    const Problem& problem = args.forward.problem;
    const Cut cut = StencilBackwardPass::cut(problem);
    return cut.chunks * cut.tiles * shares(problem, cut);
  }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    const Cut cut = StencilBackwardPass::cut(problem);
    return cut.most_queries * cut.rows * group_size(problem) * most_found<Seek::kKeys>(problem) *
           (problem.head_dim + problem.value_dim) / 3;
  }

  static int64_t scratch_bytes(const Backward& args) {
    const Cut cut = StencilBackwardPass::cut(args.forward.problem);
    Arena arena(nullptr);
    StencilBackward<Storage>(args, cut, arena);
    return arena.used();
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.forward.problem;
    const Cut cut = StencilBackwardPass::cut(problem);
    const int64_t shares = StencilBackwardPass::shares(problem, cut),
                  sheets = StencilBackwardPass::sheets(problem, cut);
    const int64_t dilation0 = problem.axes[0].dilation, dilation1 = problem.axes[1].dilation;
    Arena arena(scratch);
    StencilBackward<Storage> stencil(args, cut, arena);
    for (int64_t task = begin; task < end;) {
      const int64_t tile = task / shares % cut.tiles, chunk = task / shares / cut.tiles;
      const int64_t next = smaller(end, (task / shares + 1) * shares);
      int64_t share = task % shares, sheet = sheets * share / shares;
      const int64_t end_sheet = sheets * (share + next - task) / shares;
      stencil.start();
      while (sheet < end_sheet) {
        const int64_t strip = sheet % cut.strips, group1 = sheet / cut.strips % dilation1;
        const int64_t group0 = sheet / cut.strips / dilation1 % dilation0;
        // Strips that follow each other are done as one, so that what both see is computed once.
        const int64_t strips = problem.axes[0].length > 1 ? 1 : smaller(cut.strips - strip, end_sheet - sheet);
        stencil.run({chunk, tile, sheet / cut.strips / dilation1 / dilation0, group0, group1, strip}, strips, [&] {
          if (++sheet < sheets * (share + 1) / shares) return;
          stencil.finish(cut.tiles * shares, tile * shares + share++);
          stencil.start();
        });
      }
      task = next;
    }
  }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

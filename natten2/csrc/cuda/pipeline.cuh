// What forward and backward kernels share: shared memory, the loop over chunks, operands on the left, and scores.
#pragma once

#include "tile.cuh"

namespace natten2::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

NATTEN2_DEVICE float infinity() { return from_bits(0x7f800000u); }
NATTEN2_DEVICE float largest_finite() { return from_bits(0x7f7fffffu); }

// How a block's shared memory is divided, in bytes. `owned` is how many tensors' rows it owns, and `numbers` how many
// float32 numbers come with each partner.
struct Layout {
  int32_t owned[2];
  int32_t stage[2];  // partners of the first stage, in two tensors
  int32_t numbers;   // after them, in each stage
  int32_t stage_bytes;
  int32_t tile;  // Owned
  int32_t entries;
  int32_t rows;
  int32_t bias;
  int32_t grad_bias;
  int32_t total;
};

NATTEN2_HOST_DEVICE constexpr Layout make_layout(const Plan& plan, int row_bytes, int owned, int numbers) {
  Layout layout = {};
  layout.owned[1] = kOwned * row_bytes;
  layout.stage[0] = owned * kOwned * row_bytes;
  layout.stage[1] = layout.stage[0] + plan.chunk_rows * row_bytes;
  layout.numbers = layout.stage[1] + plan.chunk_rows * row_bytes;
  layout.stage_bytes = 2 * plan.chunk_rows * row_bytes + numbers * plan.chunk_rows * 4;
  layout.tile = layout.stage[0] + plan.stages * layout.stage_bytes;
  layout.entries = layout.tile + (static_cast<int>(sizeof(Owned)) + kPieceBytes - 1) / kPieceBytes * kPieceBytes;
  layout.rows = layout.entries + kWarps * plan.chunk_rows * static_cast<int>(sizeof(Entry));
  layout.bias = layout.rows + kWarps * plan.chunk_rows * static_cast<int>(sizeof(uint16_t));
  layout.grad_bias = layout.bias + plan.offsets * 4;
  const int end = layout.grad_bias + kWarps * plan.grad_tables * plan.offsets * 4;
  layout.total = (end + kPieceBytes - 1) / kPieceBytes * kPieceBytes;
  return layout;
}

// Loads and visits chunks `first`, `first + step`, and so on. Where two fit in memory, one is loaded during a visit.
// `load` gets a chunk's number and its stage, and so does `visit`, which must not touch the memory when it is done.
template <class Number, class Load, class Visit>
NATTEN2_DEVICE void for_each_chunk(const Plan& plan, const Layout& layout, int count, int first, int step,
                                   bool is_clean, const Load& load, const Visit& visit) {
  unsigned char* stages = shared_memory() + layout.stage[0];
  const int tensor_bytes = layout.numbers - layout.stage[0];
  if (first < count) load(first, stages);
  commit_copies();
  NATTEN2_ROLL
  for (int i = first, turn = 0; i < count; i += step, turn ^= plan.stages - 1) {
    unsigned char* stage = stages + turn * layout.stage_bytes;
    if (plan.stages == 2) {
      if (i + step < count) load(i + step, stages + (turn ^ 1) * layout.stage_bytes);
      commit_copies();
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    sync_block();
    if (is_clean) {
      keep_finite<Number>(stage, tensor_bytes);
      sync_block();
    }
    visit(i, stage);
    sync_block();
    if (plan.stages == 1) {
      if (i + step < count) load(i + step, stages);
      commit_copies();
    }
  }
}

// A warp's owned rows as left operands: in registers, or in shared memory where they are too many.
template <class Number, int kChannels, bool kInRegisters>
class Left {
 public:
  static constexpr int kSteps = kChannels / Number::kDepth;
  static constexpr int kRowBytes = kChannels * Number::kBytes;

  NATTEN2_DEVICE void start(unsigned char* owned) {
    rows_ = owned + warp_index() * kRows * kRowBytes;
    if constexpr (kInRegisters) {
      NATTEN2_UNROLL
      for (int step = 0; step < kSteps; ++step) Number::template load_left<kRowBytes>(held_[step], rows_, step);
    }
  }

  // Scores of the owned rows with 16 partners.
  NATTEN2_DEVICE void multiply(float (&score)[2][4], unsigned char* rows, const typename Number::Partners& partners,
                               bool is_exact) const {
    NATTEN2_UNROLL
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) score[j][i] = 0.0f;
    typename Number::Rest rest;
    Number::start(rest);
    if constexpr (kInRegisters) {
      NATTEN2_UNROLL
      for (int step = 0; step < kSteps; ++step)
        Number::template add_scores<kRowBytes>(score, rest, held_[step], rows, partners, step, is_exact);
    } else {
      // All at once would load more than there are registers for.
      NATTEN2_UNROLL_SOME
      for (int step = 0; step < kSteps; ++step) {
        uint32_t left[4];
        Number::template load_left<kRowBytes>(left, rows_, step);
        Number::template add_scores<kRowBytes>(score, rest, left, rows, partners, step, is_exact);
      }
    }
    Number::add_rest(score, rest);
  }

 private:
  uint32_t held_[kInRegisters ? kSteps : 1][4];
  unsigned char* rows_;
};

// What owned tokens lane / 4 and lane / 4 + 8 add to the index of a pair's bias; `sign` is 1 for keys and -1 for
// queries.
NATTEN2_DEVICE void find_bias_offsets(const Problem& problem, const Owned& owned, int sign, uint32_t (&offset)[2]) {
  uint32_t strides[kAxes];
  find_bias_strides(problem, strides);
  NATTEN2_UNROLL
  for (int half = 0; half < 2; ++half) {
    const Token& token = owned.tokens[warp_index() * kRows + lane_index() / 4 + 8 * half];
    offset[half] = 0;
    NATTEN2_UNROLL
    for (int axis = 0; axis < kAxes; ++axis)
      offset[half] +=
          static_cast<uint32_t>(problem.axes[axis].kernel_size - 1 + sign * token.position[axis]) * strides[axis] * 4;
  }
}

// One of two tensors. A reference to one that is chosen at run time would have to be in memory.
NATTEN2_DEVICE View choose(bool condition, const View& first, const View& second) {
  View view;
  view.data = condition ? first.data : second.data;
  view.batch = condition ? first.batch : second.batch;
  NATTEN2_UNROLL
  for (int axis = 0; axis < kAxes; ++axis) view.axis[axis] = condition ? first.axis[axis] : second.axis[axis];
  view.head = condition ? first.head : second.head;
  return view;
}

// Copies a head's bias to shared memory, in base 2.
NATTEN2_DEVICE void load_bias(float* bias, const float* from, int count) {
  for (int i = static_cast<int>(thread_index()); i < count; i += kThreads) bias[i] = from[i] * kLog2E;
}

// The number of a table at an index in bytes.
NATTEN2_DEVICE float* number_at(float* table, uint32_t offset) {
  return reinterpret_cast<float*>(reinterpret_cast<unsigned char*>(table) + offset);
}
NATTEN2_DEVICE const float* number_at(const float* table, uint32_t offset) {
  return reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(table) + offset);
}

// The pairs of 16 owned tokens with 16 partners, as this lane holds their scores.
struct Pairs {
  bool is_visible[2][4];
  uint32_t offset[2][4];  // index of the bias

  template <int kRowBytes>
  NATTEN2_DEVICE Pairs(const Portion<kRowBytes>& portion, int first, const uint32_t (&owned_offset)[2]) {
    NATTEN2_UNROLL
    for (int j = 0; j < 2; ++j) {
      Entry pair[2];
      portion.find_pair(first, j, pair);
      NATTEN2_UNROLL
      for (int i = 0; i < 4; ++i) {
        is_visible[j][i] = portion.is_visible(i / 2, pair[i % 2].place);
        offset[j][i] = owned_offset[i / 2] + pair[i % 2].offset;
      }
    }
  }
};

// Turns products into scores in base 2; a hidden pair's is -inf. The caller branches on whether there is a bias, so
// that what is visible needs to be in registers only for as long as each score does.
template <bool kHasBias>
NATTEN2_DEVICE void finish_scores(float (&score)[2][4], const Pairs& pairs, float scale, const float* bias) {
  NATTEN2_UNROLL
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 4; ++i) {
      if (!pairs.is_visible[j][i]) {
        score[j][i] = -infinity();
      } else if constexpr (kHasBias) {
        score[j][i] = fmaf(score[j][i], scale, *number_at(bias, pairs.offset[j][i]));
      } else {
        score[j][i] *= scale;
      }
    }
}

}  // namespace natten2::cuda

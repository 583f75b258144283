// Output and log-sum-exp: the online softmax of 16 queries per warp, in registers and in base 2.
#pragma once

#include "exact.cuh"

namespace natten2::cuda {

struct ForwardCall {
  Forward args;
  Plan plan;
  Layout layout;
};

template <class Number, int kChannels>
struct ForwardKernel {
  static constexpr int kRowBytes = kChannels * Number::kBytes;
  // For more blocks at once, where registers suffice for it.
  static constexpr int kBlocks = kRowBytes <= 64 ? 5 : kRowBytes <= 256 ? 3 : 1;

  struct State {
    float sum[kChannels / 8][4];
    float
        peak[2];  // of rows lane / 4 and lane / 4 + 8; finite, so that hidden pairs weigh exp(-inf) even where all are
    float total[2];  // of this lane's pairs
  };

  NATTEN2_DEVICE static void run(const ForwardCall& call) {
    const Forward& args = call.args;
    const Problem& problem = args.problem;
    const Plan& plan = call.plan;
    const Layout& layout = call.layout;
    unsigned char* memory = shared_memory();
    auto* bias = reinterpret_cast<float*>(memory + layout.bias);
    const int head = static_cast<int>(block_index() % problem.heads);
    if (args.bias) load_bias(bias, args.bias + static_cast<int64_t>(head) * plan.offsets, plan.offsets);
    Owned& owned = *reinterpret_cast<Owned*>(memory + layout.tile);
    for (uint32_t item = block_index() / problem.heads; item < plan.items; item += plan.parts)
      if (find_owned<false>(problem, plan, item, owned)) attend(call, layout, owned, head, args.bias ? bias : nullptr);
  }

 private:
  using LeftRows = Left<Number, kChannels, kRowBytes <= 128>;

  NATTEN2_DEVICE static void attend(const ForwardCall& call, const Layout& layout, const Owned& owned, int head,
                                    const float* bias) {
    const Forward& args = call.args;
    const Problem& problem = args.problem;
    const Plan& plan = call.plan;
    unsigned char* memory = shared_memory();
    const int key_head = head / (problem.heads / problem.key_heads);
    const Chunks chunks(plan, owned, 1, problem.additional);
    load_owned<Number, kChannels>(memory, args.query, owned, head_offset(args.query, owned.tile.batch, head),
                                  problem.head_dim);
    const auto load = [&](int step, unsigned char* stage) {
      const Box chunk = chunks.find(step);
      const Numbering numbering(chunk.size);
      const bool more = chunks.is_additional(step);
      const View views[2] = {choose(more, args.additional_keys, args.key),
                             choose(more, args.additional_values, args.value)};
      load_box<Number, kChannels>(
          stage, stage + plan.chunk_rows * kRowBytes, views,
          {head_offset(views[0], owned.tile.batch, key_head), head_offset(views[1], owned.tile.batch, key_head)},
          {problem.head_dim, problem.value_dim}, owned.tile, chunk, numbering, more);
    };

    uint32_t offset[2];
    find_bias_offsets(problem, owned, -1, offset);
    auto* entries = reinterpret_cast<Entry*>(memory + layout.entries) + warp_index() * plan.chunk_rows;
    auto* rows = reinterpret_cast<uint16_t*>(memory + layout.rows) + warp_index() * plan.chunk_rows;

    State state;
    LeftRows left;
    bool is_clean = false;
    for (;;) {
      start(state);
      bool is_first = true;
      for_each_chunk<Number>(plan, layout, chunks.count(), 0, 1, is_clean, load, [&](int step, unsigned char* stage) {
        if (is_first) left.start(memory);
        is_first = false;
        const bool more = chunks.is_additional(step);
        const Portion<kRowBytes> portion(problem, chunks.find(step), owned, more, 1, entries, rows);
        visit(state, left, portion, stage, stage + plan.chunk_rows * kRowBytes, offset, more ? nullptr : bias, problem);
      });
      if (is_clean || !any_of_block(has_nan(state))) break;
      is_clean = true;
    }
    finish(args, owned, head, state, memory);
    if (is_clean) attend_exactly(call, owned, head);
  }

  NATTEN2_DEVICE static void start(State& state) {
    NATTEN2_UNROLL
    for (int n = 0; n < kChannels / 8; ++n)
      for (int i = 0; i < 4; ++i) state.sum[n][i] = 0.0f;
    for (int half = 0; half < 2; ++half) {
      state.peak[half] = -largest_finite();
      state.total[half] = 0.0f;
    }
  }

  NATTEN2_DEVICE static void visit(State& state, const LeftRows& left, const Portion<kRowBytes>& portion,
                                   unsigned char* keys, unsigned char* values, const uint32_t (&offset)[2],
                                   const float* bias, const Problem& problem) {
    const float scale = problem.scale * kLog2E;
    NATTEN2_ROLL
    for (int first = 0; first < portion.count(); first += kRows) {
      const typename Number::Partners partners = Number::find_partners(portion.offsets(first));
      float score[2][4];
      left.multiply(score, keys, partners, problem.is_exact);
      if (bias)
        finish_scores<true>(score, Pairs(portion, first, offset), scale, bias);
      else
        finish_scores<false>(score, Pairs(portion, first, offset), scale, bias);
      float peak[2] = {state.peak[0], state.peak[1]};
      NATTEN2_UNROLL
      for (int j = 0; j < 2; ++j)
        for (int i = 0; i < 4; ++i) peak[i / 2] = fmaxf(peak[i / 2], score[j][i]);
      bool has_grown = false;
      NATTEN2_UNROLL
      for (int half = 0; half < 2; ++half) {
        peak[half] = fmaxf(peak[half], shuffle_xor(peak[half], 1));
        peak[half] = fminf(fmaxf(peak[half], shuffle_xor(peak[half], 2)), largest_finite());
        has_grown |= peak[half] != state.peak[half];
      }
      if (any_of_warp(has_grown)) {
        NATTEN2_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float shrink = power_of_two(state.peak[half] - peak[half]);
          state.peak[half] = peak[half];
          state.total[half] *= shrink;
          NATTEN2_UNROLL
          for (int n = 0; n < kChannels / 8; ++n) {
            state.sum[n][2 * half] *= shrink;
            state.sum[n][2 * half + 1] *= shrink;
          }
        }
      }
      NATTEN2_UNROLL
      for (int j = 0; j < 2; ++j)
        for (int i = 0; i < 4; ++i) {
          score[j][i] = power_of_two(score[j][i] - peak[i / 2]);
          state.total[i / 2] += score[j][i];
        }
      const typename Number::Weights weights = Number::make_weights(score, problem.is_exact);
      Number::template add_sums<kRowBytes, kChannels>(state.sum, weights, values, partners, 0, problem.is_exact);
    }
  }

  NATTEN2_DEVICE static bool has_nan(const State& state) {
    bool result = false;
    NATTEN2_UNROLL
    for (int n = 0; n < kChannels / 8; ++n)
      for (int i = 0; i < 4; ++i) result |= state.sum[n][i] != state.sum[n][i];
    return result;
  }

  NATTEN2_DEVICE static void finish(const Forward& args, const Owned& owned, int head, State& state,
                                    unsigned char* memory) {
    float factor[2];
    NATTEN2_UNROLL
    for (int half = 0; half < 2; ++half) {
      float total = state.total[half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      factor[half] = 1.0f / total;
      const Token& token = owned.tokens[warp_index() * kRows + lane_index() / 4 + 8 * half];
      if (token.exists && lane_index() % 4 == 0)
        static_cast<float*>(args.logsumexp.data)[head_offset(args.logsumexp, owned.tile.batch, head) +
                                                 token_offset(args.logsumexp, owned.tile, token.position)] =
            (state.peak[half] + logarithm(total)) * kLn2;
    }
    store_owned<Number, kChannels, kChannels>(args.output, owned, head_offset(args.output, owned.tile.batch, head),
                                              args.problem.value_dim, 0, state.sum, factor, memory);
  }

  // The queries that see what isn't finite, or hold it.
  NATTEN2_APART static void attend_exactly(const ForwardCall& call, const Owned& owned, int head) {
    const Forward& args = call.args;
    const Tile& tile = owned.tile;
    const Problem& problem = args.problem;
    const int key_head = head / (problem.heads / problem.key_heads);
    const float* bias = args.bias ? args.bias + static_cast<int64_t>(head) * call.plan.offsets : nullptr;
    NATTEN2_ROLL
    for (int row = 0; row < kRows; ++row) {
      const Token& token = owned.tokens[warp_index() * kRows + row];
      if (!token.exists) continue;
      Spread<Number, kChannels> query, key, value, sum;
      query.load(args.query, head_offset(args.query, tile.batch, head) + token_offset(args.query, tile, token.position),
                 problem.head_dim);
      sum.fill(0.0f);
      float peak = -largest_finite(), total = 0.0f;
      bool sees_infinite = !query.is_finite();
      const auto visit = [&](float bias_of_pair) {
        sees_infinite |= !key.is_finite() || !value.is_finite();
        const float score = query.dot(key) * (problem.scale * kLog2E) + bias_of_pair * kLog2E;
        const float higher = fminf(fmaxf(peak, score), largest_finite());
        const float shrink = power_of_two(peak - higher), weight = power_of_two(score - higher);
        sum.multiply(shrink);
        sum.add(value, weight);
        total = total * shrink + weight;
        peak = higher;
      };
      for_each_partner(token, [&](const int (&at)[kAxes]) {
        key.load(args.key, head_offset(args.key, tile.batch, key_head) + token_offset(args.key, tile, at),
                 problem.head_dim);
        value.load(args.value, head_offset(args.value, tile.batch, key_head) + token_offset(args.value, tile, at),
                   problem.value_dim);
        visit(bias ? bias[exact_bias_offset(problem, token.position, at)] : 0.0f);
      });
      for (int n = 0; n < problem.additional; ++n) {
        key.load(args.additional_keys,
                 head_offset(args.additional_keys, tile.batch, key_head) + n * args.additional_keys.axis[kAxes - 1],
                 problem.head_dim);
        value.load(
            args.additional_values,
            head_offset(args.additional_values, tile.batch, key_head) + n * args.additional_values.axis[kAxes - 1],
            problem.value_dim);
        visit(0.0f);
      }
      if (!any_of_warp(sees_infinite)) continue;
      sum.store(args.output,
                head_offset(args.output, tile.batch, head) + token_offset(args.output, tile, token.position), 0,
                problem.value_dim, 1.0f / total);
      if (lane_index() == 0)
        static_cast<float*>(args.logsumexp.data)[head_offset(args.logsumexp, tile.batch, head) +
                                                 token_offset(args.logsumexp, tile, token.position)] =
            (peak + logarithm(total)) * kLn2;
    }
  }
};

template <class Number, int kChannels>
NATTEN2_KERNEL void NATTEN2_BOUNDS(kThreads, (ForwardKernel<Number, kChannels>::kBlocks))
    forward_kernel(NATTEN2_CONSTANT ForwardCall call) {
  ForwardKernel<Number, kChannels>::run(call);
}

}  // namespace natten2::cuda

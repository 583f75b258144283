// Output and log-sum-exp: the online softmax of 16 queries per warp, in registers and in base 2.
#pragma once

#include "exact.cuh"

namespace natten2::cuda {

struct ForwardCall {
  Forward args;
  Plan plan;
};

template <class Number, int kChannels>
struct ForwardKernel {
  static constexpr int kRowBytes = kChannels * Number::kBytes;
  // For more blocks at once, where registers suffice for it.
  static constexpr int kBlocks = kRowBytes <= 64 ? 5 : kRowBytes <= 128 ? 4 : kRowBytes <= 256 ? 3 : 1;

  struct State {
    float sum[kChannels / 8][4];
    float peak[2];   // of rows lane / 4 and lane / 4 + 8
    float total[2];  // of this lane's pairs
  };

  NATTEN2_DEVICE static void run(const ForwardCall& call) {
    const Forward& args = call.args;
    const Problem& problem = args.problem;
    const Plan& plan = call.plan;
    const Layout layout = make_layout(plan, kRowBytes, 1, 0);
    unsigned char* memory = shared_memory();
    auto* bias = reinterpret_cast<float*>(memory + layout.bias);
    const int head = static_cast<int>(block_index() % problem.heads);
    if (args.bias) load_bias(bias, args.bias + static_cast<int64_t>(head) * plan.offsets, plan.offsets);
    for (uint32_t item = block_index() / problem.heads; item < plan.items; item += plan.parts) {
      const Tile tile = find_tile(problem, plan, item);
      if (tile.is_empty) continue;
      attend(call, layout, tile, head, args.bias ? bias : nullptr);
      // The next tile's rows take the place of those that other warps may still be storing.
      sync_block();
    }
  }

 private:
  NATTEN2_DEVICE static void attend(const ForwardCall& call, const Layout& layout, const Tile& tile, int head,
                                    const float* bias) {
    const Forward& args = call.args;
    const Problem& problem = args.problem;
    const Plan& plan = call.plan;
    unsigned char* memory = shared_memory();
    const int key_head = head / (problem.heads / problem.key_heads);
    const int64_t query = head_offset(args.query, tile.batch, head);
    const int64_t key = head_offset(args.key, tile.batch, key_head);
    const int64_t value = head_offset(args.value, tile.batch, key_head);
    const int64_t more_keys = head_offset(args.additional_keys, tile.batch, key_head);
    const int64_t more_values = head_offset(args.additional_values, tile.batch, key_head);

    const Box box = cover<false>(problem, plan, tile);
    const Chunks chunks(plan, box, 1, problem.additional);
    load_owned<Number, kChannels>(memory, args.query, plan, tile, query, problem.head_dim);
    const auto load = [&](int step, unsigned char* stage) {
      const Box chunk = chunks.find(step);
      const Numbering numbering(chunk.size);
      unsigned char* values = stage + plan.chunk_rows * kRowBytes;
      const bool more = chunks.is_additional(step);
      load_box<Number, kChannels>(stage, more ? args.additional_keys : args.key, tile, chunk, numbering,
                                  more ? more_keys : key, problem.head_dim, more);
      load_box<Number, kChannels>(values, more ? args.additional_values : args.value, tile, chunk, numbering,
                                  more ? more_values : value, problem.value_dim, more);
    };

    const Owned owned = find_owned<false>(problem, plan, tile);
    uint32_t bias_strides[kAxes], offset[2];
    find_bias_strides(problem, bias_strides);
    const uint32_t own_offset = bias_offset(problem, bias_strides, owned.position, -1);
    for (int half = 0; half < 2; ++half) offset[half] = shuffle(own_offset, lane_index() / 4 + 8 * half);
    auto* entries = reinterpret_cast<Entry*>(memory + layout.entries) + warp_index() * plan.chunk_rows;
    auto* rows = reinterpret_cast<uint16_t*>(memory + layout.rows) + warp_index() * plan.chunk_rows;

    State state;
    Left<Number, kChannels, kRowBytes <= 256> left;
    bool is_clean = false;
    for (;;) {
      start(state);
      bool is_first = true;
      for_each_chunk<Number>(plan, layout, chunks.count(), 0, 1, is_clean, load, [&](int step, unsigned char* stage) {
        if (is_first) left.start(memory);
        is_first = false;
        const bool more = chunks.is_additional(step);
        const Portion portion(chunks.find(step), owned, more, bias_strides, 1, entries, rows);
        visit(state, left, portion, stage, stage + plan.chunk_rows * kRowBytes, offset, more ? nullptr : bias, problem);
      });
      if (is_clean || !any_of_block(has_nan(state))) break;
      is_clean = true;
    }
    finish(call, tile, head, owned, state, memory);
    if (is_clean) attend_exactly(call, tile, head, owned);
  }

  NATTEN2_DEVICE static void start(State& state) {
    NATTEN2_UNROLL
    for (int n = 0; n < kChannels / 8; ++n)
      NATTEN2_UNROLL
      for (int i = 0; i < 4; ++i) state.sum[n][i] = 0.0f;
    for (int half = 0; half < 2; ++half) {
      state.peak[half] = -infinity();
      state.total[half] = 0.0f;
    }
  }

  NATTEN2_DEVICE static void visit(State& state, const Left<Number, kChannels, kRowBytes <= 256>& left,
                                   const Portion& portion, unsigned char* keys, unsigned char* values,
                                   const uint32_t (&offset)[2], const float* bias, const Problem& problem) {
    const float scale = problem.scale * kLog2E;
    NATTEN2_ROLL
    for (int first = 0; first < portion.count(); first += kRows) {
      const typename Number::Partners partners = Number::find_partners(portion.rows(first));
      float score[2][4];
      left.multiply(score, keys, partners, problem.is_exact);
      const Pairs pairs(portion, first, offset);
      finish_scores(score, pairs, scale, bias);
      float peak[2] = {state.peak[0], state.peak[1]};
      NATTEN2_UNROLL
      for (int j = 0; j < 2; ++j)
        NATTEN2_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (!pairs.is_visible[j][i]) score[j][i] = -infinity();
          peak[i / 2] = fmaxf(peak[i / 2], score[j][i]);
        }
      float finite[2];
      bool has_grown = false;
      NATTEN2_UNROLL
      for (int half = 0; half < 2; ++half) {
        peak[half] = fmaxf(peak[half], shuffle_xor(peak[half], 1));
        peak[half] = fmaxf(peak[half], shuffle_xor(peak[half], 2));
        finite[half] = finite_peak(peak[half]);
        has_grown |= peak[half] != state.peak[half];
      }
      if (any_of_warp(has_grown)) {
        NATTEN2_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float shrink = power_of_two(state.peak[half] - finite[half]);
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
        NATTEN2_UNROLL
        for (int i = 0; i < 4; ++i) {
          score[j][i] = power_of_two(score[j][i] - finite[i / 2]);
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
      NATTEN2_UNROLL
      for (int i = 0; i < 4; ++i) result |= state.sum[n][i] != state.sum[n][i];
    return result;
  }

  NATTEN2_DEVICE static void finish(const ForwardCall& call, const Tile& tile, int head, const Owned& owned,
                                    State& state, unsigned char* memory) {
    const Forward& args = call.args;
    float factor[2];
    NATTEN2_UNROLL
    for (int half = 0; half < 2; ++half) {
      float total = state.total[half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      factor[half] = 1.0f / total;
      state.total[half] = (state.peak[half] + logarithm(total)) * kLn2;
    }
    store_owned<Number, kChannels, kChannels>(args.output, call.plan, tile,
                                              head_offset(args.output, tile.batch, head), args.problem.value_dim, 0,
                                              state.sum, factor, memory);
    // Lane r holds where row r is, and lane 4 * (r % 8) its log-sum-exp.
    const int from = lane_index() % 8 * 4;
    const float lower = shuffle(state.total[0], from), upper = shuffle(state.total[1], from);
    if (lane_index() < kRows && owned.exists)
      static_cast<float*>(args.logsumexp.data)[head_offset(args.logsumexp, tile.batch, head) +
                                               token_offset(args.logsumexp, tile, owned.position)] =
          lane_index() < 8 ? lower : upper;
  }

  // The queries that see what isn't finite.
  NATTEN2_DEVICE static void attend_exactly(const ForwardCall& call, const Tile& tile, int head, const Owned& owned) {
    const Forward& args = call.args;
    const Problem& problem = args.problem;
    const int key_head = head / (problem.heads / problem.key_heads);
    const float* bias = args.bias ? args.bias + static_cast<int64_t>(head) * call.plan.offsets : nullptr;
    NATTEN2_ROLL
    for (int row = 0; row < kRows; ++row) {
      const ExactToken token(owned, row);
      if (!token.exists) continue;
      Spread<Number, kChannels> query, key, value, sum;
      query.load(args.query,
                 head_offset(args.query, tile.batch, head) + token_offset(args.query, tile, token.position),
                 problem.head_dim);
      sum.fill(0.0f);
      float peak = -infinity(), total = 0.0f;
      bool sees_infinite = false;
      const auto visit = [&](float bias_of_pair) {
        sees_infinite |= !key.is_finite() || !value.is_finite();
        const float score = query.dot(key) * (problem.scale * kLog2E) + bias_of_pair * kLog2E;
        const float higher = fmaxf(peak, score), finite = finite_peak(higher);
        const float shrink = power_of_two(peak - finite), weight = power_of_two(score - finite);
        sum.multiply(shrink);
        sum.add(value, weight);
        total = total * shrink + weight;
        peak = higher;
      };
      token.for_each_partner([&](const int(&at)[kAxes]) {
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
        value.load(args.additional_values,
                   head_offset(args.additional_values, tile.batch, key_head) +
                       n * args.additional_values.axis[kAxes - 1],
                   problem.value_dim);
        visit(0.0f);
      }
      if (!any_of_warp(sees_infinite)) continue;
      sum.store(args.output,
                head_offset(args.output, tile.batch, head) + token_offset(args.output, tile, token.position),
                0, problem.value_dim, 1.0f / total);
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

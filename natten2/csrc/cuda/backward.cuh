// Gradients, gathered by their owners: queries visit the keys that they see, keys the queries that see them, and
// additional keys all queries. Every sum has one owner and one order, so there are no atomics.
//
// With P = exp(S - logsumexp) and dS = P * (grad_output . value - delta), where delta = grad_output . output -
// grad_logsumexp: a query's gradient sums dS * key, a key's dS * query, a value's P * grad_output, and the bias's dS by
// offset. A warp keeps sums by offset in shared memory; those who add at once hold different queries and, in one table,
// the same key, and so different offsets.
#pragma once

#include "exact.cuh"

namespace natten2::cuda {

struct BackwardCall {
  Backward args;
  Plan plan;
};

template <class Number, int kChannels, bool kOwnsKeys>
struct BackwardKernel {
  static constexpr int kRowBytes = kChannels * Number::kBytes;
  // Two sums of more channels than these would not fit in registers: other blocks take the rest.
  static constexpr int kColumns = kOwnsKeys && kChannels > 128 ? 128 : kChannels;
  static constexpr int kShares = kChannels / kColumns;
  static constexpr int kNumbers = kOwnsKeys ? 2 : 0;
  static constexpr int kBlocks = kRowBytes <= 64 ? 4 : kRowBytes <= 128 ? 3 : kRowBytes <= 256 ? 2 : 1;

  using LeftRows = Left<Number, kChannels, kRowBytes <= 128>;

  // What the owner's rows are multiplied with first, and then summed.
  struct Operands {
    View owned[2], partners[2];
    int heads, group;
  };

  struct State {
    float first[kColumns / 8][4];                   // of dS
    float second[kOwnsKeys ? kColumns / 8 : 1][4];  // of P
  };

  // Of owned queries lane / 4 and lane / 4 + 8; the log-sum-exp is in base 2.
  struct Upstream {
    float logsumexp[2], delta[2];
  };

  NATTEN2_DEVICE static void run(const BackwardCall& call) {
    const Backward& args = call.args;
    const Plan& plan = call.plan;
    const Layout layout = make_layout(plan, kRowBytes, 2, kNumbers);
    const Operands operands = find_operands(args, plan);
    const int head = static_cast<int>(block_index() % operands.heads);
    const uint32_t part = block_index() / operands.heads;
    auto* sums = reinterpret_cast<float*>(shared_memory() + layout.grad_bias);
    const bool sums_bias = !kOwnsKeys && plan.grad_tables > 0;
    if (!kOwnsKeys && args.forward.bias)
      load_bias(reinterpret_cast<float*>(shared_memory() + layout.bias),
                args.forward.bias + static_cast<int64_t>(head) * plan.offsets, plan.offsets);
    if (sums_bias)
      for (int i = thread_index(); i < kWarps * plan.grad_tables * plan.offsets; i += kThreads) sums[i] = 0.0f;
    for (uint32_t item = part; item < plan.items; item += plan.parts) {
      const Tile tile = find_tile(args.forward.problem, plan, item);
      if (tile.is_empty) continue;
      gather(call, layout, operands, tile, head);
      sync_block();
    }
    if (!sums_bias) return;
    sync_block();
    float* out = args.grad_bias + (static_cast<int64_t>(part) * operands.heads + head) * plan.offsets;
    for (int i = thread_index(); i < plan.offsets; i += kThreads) {
      float sum = 0.0f;
      for (int table = 0; table < kWarps * plan.grad_tables; ++table) sum += sums[table * plan.offsets + i];
      out[i] = sum;
    }
  }

 private:
  NATTEN2_DEVICE static Operands find_operands(const Backward& args, const Plan& plan) {
    const Forward& forward = args.forward;
    const Problem& problem = forward.problem;
    const int group = problem.heads / problem.key_heads;
    if constexpr (kOwnsKeys) {
      return {{plan.sees_all ? forward.additional_keys : forward.key,
               plan.sees_all ? forward.additional_values : forward.value},
              {forward.query, args.grad_output},
              problem.key_heads,
              group};
    } else {
      return {{forward.query, args.grad_output}, {forward.key, forward.value}, problem.heads, group};
    }
  }

  NATTEN2_DEVICE static void gather(const BackwardCall& call, const Layout& layout, const Operands& operands,
                                    const Tile& tile, int head) {
    const Backward& args = call.args;
    const Forward& forward = args.forward;
    const Problem& problem = forward.problem;
    const Plan& plan = call.plan;
    unsigned char* memory = shared_memory();
    auto* bias = forward.bias && !plan.sees_all ? reinterpret_cast<float*>(memory + layout.bias) : nullptr;
    const int additional = kOwnsKeys ? 0 : problem.additional;
    const Box box = cover<kOwnsKeys>(problem, plan, tile);
    const Chunks chunks(plan, box, kOwnsKeys ? operands.group : 1, additional);
    load_owned<Number, kChannels>(memory, operands.owned[0], plan, tile,
                                  head_offset(operands.owned[0], tile.batch, head), problem.head_dim);
    load_owned<Number, kChannels>(memory + layout.owned[1], operands.owned[1], plan, tile,
                                  head_offset(operands.owned[1], tile.batch, head), problem.value_dim);
    // The head of a chunk's partners.
    const auto partner_head = [&](int step) {
      return kOwnsKeys ? head * operands.group + chunks.member(step) : head / operands.group;
    };
    const auto load = [&](int step, unsigned char* stage) {
      const Box chunk = chunks.find(step);
      const Numbering numbering(chunk.size);
      const bool more = chunks.is_additional(step);
      const View& first = more ? forward.additional_keys : operands.partners[0];
      const View& second = more ? forward.additional_values : operands.partners[1];
      const int from = partner_head(step);
      load_box<Number, kChannels>(stage, first, tile, chunk, numbering, head_offset(first, tile.batch, from),
                                  problem.head_dim, more);
      load_box<Number, kChannels>(stage + plan.chunk_rows * kRowBytes, second, tile, chunk, numbering,
                                  head_offset(second, tile.batch, from), problem.value_dim, more);
      if constexpr (kOwnsKeys) {
        auto* numbers = reinterpret_cast<float*>(stage + 2 * plan.chunk_rows * kRowBytes);
        load_numbers(numbers, forward.logsumexp, tile, chunk, numbering,
                     head_offset(forward.logsumexp, tile.batch, from));
        load_numbers(numbers + plan.chunk_rows, args.delta, tile, chunk, numbering,
                     head_offset(args.delta, tile.batch, from));
      }
    };

    const Owned owned = find_owned<kOwnsKeys>(problem, plan, tile);
    uint32_t bias_strides[kAxes], offset[2];
    find_bias_strides(problem, bias_strides);
    const uint32_t own_offset = bias_offset(problem, bias_strides, owned.position, kOwnsKeys ? 1 : -1);
    for (int half = 0; half < 2; ++half) offset[half] = shuffle(own_offset, lane_index() / 4 + 8 * half);
    const Upstream upstream = load_upstream(args, tile, head, owned);
    auto* entries = reinterpret_cast<Entry*>(memory + layout.entries) + warp_index() * plan.chunk_rows;
    auto* rows = reinterpret_cast<uint16_t*>(memory + layout.rows) + warp_index() * plan.chunk_rows;
    float* sums = reinterpret_cast<float*>(memory + layout.grad_bias) +
                  warp_index() * plan.grad_tables * plan.offsets;

    State state;
    LeftRows left[2];
    const int first_step = block_row() / kShares;
    bool is_clean = false;
    for (;;) {
      start(state);
      bool is_first = true;
      int bias_head = -1;
      for_each_chunk<Number>(
          plan, layout, chunks.count(), first_step, plan.step_parts, is_clean, load,
          [&](int step, unsigned char* stage) {
            if (is_first) {
              left[0].start(memory);
              left[1].start(memory + layout.owned[1]);
            }
            is_first = false;
            const bool more = chunks.is_additional(step);
            if (kOwnsKeys && bias && bias_head != partner_head(step)) {
              bias_head = partner_head(step);
              load_bias(bias, forward.bias + static_cast<int64_t>(bias_head) * plan.offsets, plan.offsets);
              sync_block();
            }
            const Portion portion(chunks.find(step), owned, more, bias_strides, kOwnsKeys ? -1 : 1, entries, rows);
            visit(state, left, portion, stage, plan, offset, more ? nullptr : bias, upstream,
                  plan.grad_tables > 0 && !more && !is_clean ? sums : nullptr, problem);
          });
      if (is_clean || plan.sees_all || !any_of_block(has_nan(state))) break;
      is_clean = true;
    }
    finish(call, layout, tile, head, state);
    if (is_clean) gather_exactly(call, operands, tile, head, owned);
  }

  NATTEN2_DEVICE static Upstream load_upstream(const Backward& args, const Tile& tile, int head, const Owned& owned) {
    Upstream upstream = {};
    if constexpr (!kOwnsKeys) {
      const View& logsumexp = args.forward.logsumexp;
      const float own_logsumexp =
          static_cast<const float*>(
              logsumexp.data)[head_offset(logsumexp, tile.batch, head) + token_offset(logsumexp, tile, owned.position)];
      const float own_delta = static_cast<const float*>(
          args.delta.data)[head_offset(args.delta, tile.batch, head) + token_offset(args.delta, tile, owned.position)];
      for (int half = 0; half < 2; ++half) {
        upstream.logsumexp[half] = shuffle(own_logsumexp, lane_index() / 4 + 8 * half) * kLog2E;
        upstream.delta[half] = shuffle(own_delta, lane_index() / 4 + 8 * half);
      }
    }
    return upstream;
  }

  NATTEN2_DEVICE static void start(State& state) {
    NATTEN2_UNROLL
    for (auto& sum : state.first)
      NATTEN2_UNROLL
      for (float& number : sum) number = 0.0f;
    NATTEN2_UNROLL
    for (auto& sum : state.second)
      NATTEN2_UNROLL
      for (float& number : sum) number = 0.0f;
  }

  NATTEN2_DEVICE static void visit(State& state, const LeftRows (&left)[2], const Portion& portion,
                                   unsigned char* stage, const Plan& plan, const uint32_t (&offset)[2],
                                   const float* bias, const Upstream& upstream, float* sums, const Problem& problem) {
    unsigned char* second = stage + plan.chunk_rows * kRowBytes;
    const auto* numbers = reinterpret_cast<const float*>(second + plan.chunk_rows * kRowBytes);
    const float scale = problem.scale * kLog2E;
    const int share = kShares == 1 ? 0 : block_row() % kShares;
    NATTEN2_ROLL
    for (int at = 0; at < portion.count(); at += kRows) {
      const uint16_t* rows = portion.rows(at);
      const typename Number::Partners partners = Number::find_partners(rows);
      float weight[2][4], grad[2][4];
      left[0].multiply(weight, stage, partners, problem.is_exact);
      left[1].multiply(grad, second, partners, problem.is_exact);
      const Pairs pairs(portion, at, offset);
      finish_scores(weight, pairs, scale, bias);
      NATTEN2_UNROLL
      for (int j = 0; j < 2; ++j)
        NATTEN2_UNROLL
        for (int i = 0; i < 4; ++i) {
          float logsumexp = upstream.logsumexp[i / 2], delta = upstream.delta[i / 2];
          if constexpr (kOwnsKeys) {
            const int row = rows[8 * j + 2 * (lane_index() % 4) + i % 2];
            logsumexp = numbers[row] * kLog2E;
            delta = numbers[plan.chunk_rows + row];
          }
          const float probability = power_of_two(weight[j][i] - logsumexp);
          weight[j][i] = pairs.is_visible[j][i] ? probability : 0.0f;
          grad[j][i] = pairs.is_visible[j][i] ? probability * (grad[j][i] - delta) : 0.0f;
        }
      if constexpr (kOwnsKeys) {
        const typename Number::Weights weights = Number::make_weights(weight, problem.is_exact);
        Number::template add_sums<kRowBytes, kColumns>(state.second, weights, second, partners, share * kColumns,
                                                       problem.is_exact);
      }
      const typename Number::Weights grads = Number::make_weights(grad, problem.is_exact);
      Number::template add_sums<kRowBytes, kColumns>(state.first, grads, stage, partners, share * kColumns,
                                                     problem.is_exact);
      if (!kOwnsKeys && sums) add_by_offset(sums, grad, pairs, plan);
    }
  }

  // Lanes that are equal modulo 4 hold the same key, so that each group of them takes a table, or its turn.
  NATTEN2_DEVICE static void add_by_offset(float* sums, const float (&grad)[2][4], const Pairs& pairs,
                                           const Plan& plan) {
    const int column = lane_index() % 4;
    if (plan.grad_tables == 4) sums += column * plan.offsets;
    NATTEN2_ROLL
    for (int turn = 0; turn < 4 / plan.grad_tables; ++turn) {
      const bool is_mine = plan.grad_tables == 4 || turn == column;
      NATTEN2_UNROLL
      for (int j = 0; j < 2; ++j)
        NATTEN2_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (is_mine && pairs.is_visible[j][i]) sums[pairs.offset[j][i]] += grad[j][i];
          sync_warp();
        }
    }
  }

  NATTEN2_DEVICE static bool has_nan(const State& state) {
    bool result = false;
    NATTEN2_UNROLL
    for (const auto& sum : state.first)
      NATTEN2_UNROLL
      for (const float number : sum) result |= number != number;
    NATTEN2_UNROLL
    for (const auto& sum : state.second)
      NATTEN2_UNROLL
      for (const float number : sum) result |= number != number;
    return result;
  }

  NATTEN2_DEVICE static void finish(const BackwardCall& call, const Layout& layout, const Tile& tile, int head,
                                    const State& state) {
    const Backward& args = call.args;
    const Problem& problem = args.forward.problem;
    const Plan& plan = call.plan;
    unsigned char* memory = shared_memory();
    const int column = kShares == 1 ? 0 : block_row() % kShares * kColumns;
    const float scales[2] = {problem.scale, problem.scale}, ones[2] = {1.0f, 1.0f};
    if constexpr (!kOwnsKeys) {
      store_owned<Number, kChannels, kColumns>(args.grad_query, plan, tile,
                                               head_offset(args.grad_query, tile.batch, head), problem.head_dim,
                                               column, state.first, scales, memory);
    } else if (plan.sees_all) {
      const int64_t tokens = static_cast<int64_t>(problem.batch) * problem.additional * problem.key_heads;
      const int64_t part = block_row() / kShares;
      float* values = args.grad_additional + tokens * plan.step_parts * problem.head_dim;
      store_part(args.grad_additional + part * tokens * problem.head_dim, call, tile, head, problem.head_dim, column,
                 state.first, problem.scale);
      store_part(values + part * tokens * problem.value_dim, call, tile, head, problem.value_dim, column, state.second,
                 1.0f);
    } else {
      store_owned<Number, kChannels, kColumns>(args.grad_key, plan, tile, head_offset(args.grad_key, tile.batch, head),
                                               problem.head_dim, column, state.first, scales, memory);
      store_owned<Number, kChannels, kColumns>(args.grad_value, plan, tile,
                                               head_offset(args.grad_value, tile.batch, head), problem.value_dim,
                                               column, state.second, ones, memory + layout.owned[1]);
    }
  }

  // Writes a part of the sums of additional keys, [batch, additional, key heads, channels].
  template <int kTiles>
  NATTEN2_DEVICE static void store_part(float* out, const BackwardCall& call, const Tile& tile, int head, int channels,
                                        int column, const float (&sum)[kTiles][4], float factor) {
    const Problem& problem = call.args.forward.problem;
    NATTEN2_UNROLL
    for (int half = 0; half < 2; ++half) {
      int position[kAxes];
      if (!locate_owned(call.plan, tile, warp_index() * kRows + lane_index() / 4 + 8 * half, position)) continue;
      const int64_t token = static_cast<int64_t>(tile.batch) * problem.additional + position[kAxes - 1];
      float* row = out + (token * problem.key_heads + head) * channels;
      NATTEN2_UNROLL
      for (int n = 0; n < kTiles; ++n)
        NATTEN2_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int channel = column + 8 * n + 2 * (lane_index() % 4) + i;
          if (channel < channels) row[channel] = sum[n][2 * half + i] * factor;
        }
    }
  }

  // The owners that see what isn't finite.
  NATTEN2_DEVICE static void gather_exactly(const BackwardCall& call, const Operands& operands, const Tile& tile,
                                            int head, const Owned& owned) {
    using Row = Spread<Number, kChannels>;
    const Backward& args = call.args;
    const Forward& forward = args.forward;
    const Problem& problem = forward.problem;
    const int column = kShares == 1 ? 0 : block_row() % kShares * kColumns;
    NATTEN2_ROLL
    for (int row = 0; row < kRows; ++row) {
      const ExactToken token(owned, row);
      if (!token.exists) continue;
      Row own[2], partner[2], sum[2];
      for (int i = 0; i < 2; ++i) {
        own[i].load(operands.owned[i],
                    head_offset(operands.owned[i], tile.batch, head) +
                        token_offset(operands.owned[i], tile, token.position),
                    i ? problem.value_dim : problem.head_dim);
        sum[i].fill(0.0f);
      }
      bool sees_infinite = false;
      const auto visit = [&](const int(&query)[kAxes], int query_head, float bias) {
        const auto number = [&](const View& view) {
          return static_cast<const float*>(
              view.data)[head_offset(view, tile.batch, query_head) + token_offset(view, tile, query)];
        };
        sees_infinite |= !partner[0].is_finite() || !partner[1].is_finite();
        const float score = own[0].dot(partner[0]) * (problem.scale * kLog2E) + bias * kLog2E;
        const float weight = power_of_two(score - number(forward.logsumexp) * kLog2E);
        sum[0].add(partner[0], weight * (own[1].dot(partner[1]) - number(args.delta)));
        sum[1].add(partner[1], weight);
      };
      for (int member = 0; member < (kOwnsKeys ? operands.group : 1); ++member) {
        const int from = kOwnsKeys ? head * operands.group + member : head / operands.group;
        const int query_head = kOwnsKeys ? from : head;
        const float* bias =
            forward.bias ? forward.bias + static_cast<int64_t>(query_head) * call.plan.offsets : nullptr;
        token.for_each_partner([&](const int(&at)[kAxes]) {
          for (int i = 0; i < 2; ++i)
            partner[i].load(operands.partners[i],
                            head_offset(operands.partners[i], tile.batch, from) +
                                token_offset(operands.partners[i], tile, at),
                            i ? problem.value_dim : problem.head_dim);
          const auto& query = kOwnsKeys ? at : token.position;
          const auto& key = kOwnsKeys ? token.position : at;
          visit(query, query_head, bias ? bias[exact_bias_offset(problem, query, key)] : 0.0f);
        });
      }
      for (int n = 0; n < (kOwnsKeys ? 0 : problem.additional); ++n) {
        const View views[2] = {forward.additional_keys, forward.additional_values};
        for (int i = 0; i < 2; ++i)
          partner[i].load(
              views[i], head_offset(views[i], tile.batch, head / operands.group) + n * views[i].axis[kAxes - 1],
              i ? problem.value_dim : problem.head_dim);
        visit(token.position, head, 0.0f);
      }
      if (!any_of_warp(sees_infinite)) continue;
      const auto store = [&](const View& view, const Row& result, int channels, float factor) {
        result.store(view, head_offset(view, tile.batch, head) + token_offset(view, tile, token.position), column,
                     smaller<int>(column + kColumns, channels), factor);
      };
      store(kOwnsKeys ? args.grad_key : args.grad_query, sum[0], problem.head_dim, problem.scale);
      if (kOwnsKeys) store(args.grad_value, sum[1], problem.value_dim, 1.0f);
    }
  }
};

template <class Number, int kChannels, bool kOwnsKeys>
NATTEN2_KERNEL void NATTEN2_BOUNDS(kThreads, (BackwardKernel<Number, kChannels, kOwnsKeys>::kBlocks))
    backward_kernel(NATTEN2_CONSTANT BackwardCall call) {
  BackwardKernel<Number, kChannels, kOwnsKeys>::run(call);
}

// delta = grad_output . output - grad_logsumexp, by four lanes for each row.
template <class Number>
NATTEN2_KERNEL void NATTEN2_BOUNDS(kThreads, 1) delta_kernel(NATTEN2_CONSTANT Backward args) {
  constexpr int kRowLanes = 4, kBlockRows = kThreads / kRowLanes, kPiece = kPieceBytes / Number::kBytes;
  const Problem& problem = args.forward.problem;
  const int64_t block_row = static_cast<int64_t>(block_index()) * kBlockRows;
  const uint32_t row = static_cast<uint32_t>(block_row % problem.heads) + thread_index() / kRowLanes;
  const int head = static_cast<int>(row % problem.heads);
  const int64_t token = block_row / problem.heads + row / problem.heads;
  uint32_t rest = static_cast<uint32_t>(token);
  int position[kAxes];
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    position[axis] = static_cast<int>(rest % problem.axes[axis].length);
    rest /= problem.axes[axis].length;
  }
  const bool exists = rest < static_cast<uint32_t>(problem.batch);
  const auto offset = [&](const View& view) {
    int64_t result = head_offset(view, static_cast<int>(rest), head);
    for (int axis = 0; axis < kAxes; ++axis) result += position[axis] * view.axis[axis];
    return result;
  };
  float sum = 0.0f;
  if (exists) {
    using Storage = typename Number::Storage;
    const auto* grads = static_cast<const Storage*>(args.grad_output.data) + offset(args.grad_output);
    const auto* outputs = static_cast<const Storage*>(args.forward.output.data) + offset(args.forward.output);
    for (int channel = thread_index() % kRowLanes * kPiece; channel < problem.value_dim;
         channel += kRowLanes * kPiece) {
      const Words grad = *reinterpret_cast<const Words*>(grads + channel);
      const Words output = *reinterpret_cast<const Words*>(outputs + channel);
      NATTEN2_UNROLL
      for (int i = 0; i < kPiece; ++i) {
        const int word = i / Number::kPerWord, part = i % Number::kPerWord;
        sum += Number::widen(grad.word[word], part) * Number::widen(output.word[word], part);
      }
    }
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  if (!exists || thread_index() % kRowLanes) return;
  if (args.grad_logsumexp.data)
    sum -= static_cast<const float*>(args.grad_logsumexp.data)[offset(args.grad_logsumexp)];
  static_cast<float*>(args.delta.data)[offset(args.delta)] = sum;
}

}  // namespace natten2::cuda

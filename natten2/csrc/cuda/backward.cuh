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
  Layout layout;
};

template <class Number, int kChannels, bool kOwnsKeys>
struct BackwardKernel {
  static constexpr int kRowBytes = kChannels * Number::kBytes;
  // Two sums of more channels than these would not fit in registers: other blocks take the rest.
  static constexpr int kColumns = kOwnsKeys && kRowBytes > 256 ? kChannels / 2 : kChannels;
  static constexpr int kShares = kChannels / kColumns;
  static constexpr int kNumbers = kOwnsKeys ? 2 : 0;
  static constexpr int kBlocks = kRowBytes <= 64 ? 4 : kRowBytes <= 128 ? 3 : kRowBytes <= 256 ? 2 : 1;

  using LeftRows = Left<Number, kChannels, kRowBytes <= (kOwnsKeys ? 64 : 128)>;

  struct State {
    float first[kColumns / 8][4];                   // of dS
    float second[kOwnsKeys ? kColumns / 8 : 1][4];  // of P
  };

  // Of owned queries lane / 4 and lane / 4 + 8; the log-sum-exp is in base 2.
  struct Upstream {
    float logsumexp[2], delta[2];
  };

  struct Numbers {
    float logsumexp, delta;
  };

  NATTEN2_DEVICE static void run(const BackwardCall& call) {
    const Backward& args = call.args;
    const Problem& problem = args.forward.problem;
    const Plan& plan = call.plan;
    const Layout& layout = call.layout;
    const int heads = kOwnsKeys ? problem.key_heads : problem.heads;
    const int head = static_cast<int>(block_index() % heads);
    const uint32_t part = block_index() / heads;
    auto* sums = reinterpret_cast<float*>(shared_memory() + layout.grad_bias);
    const bool sums_bias = !kOwnsKeys && plan.grad_tables > 0;
    if (!kOwnsKeys && args.forward.bias)
      load_bias(reinterpret_cast<float*>(shared_memory() + layout.bias),
                args.forward.bias + static_cast<int64_t>(head) * plan.offsets, plan.offsets);
    if (sums_bias)
      for (int i = static_cast<int>(thread_index()); i < kWarps * plan.grad_tables * plan.offsets; i += kThreads)
        sums[i] = 0.0f;
    Owned& owned = *reinterpret_cast<Owned*>(shared_memory() + layout.tile);
    for (uint32_t item = part; item < plan.items; item += plan.parts)
      if (find_owned<kOwnsKeys>(problem, plan, item, owned)) gather(call, layout, owned, head);
    if (!sums_bias) return;
    sync_block();
    float* out = args.grad_bias + (static_cast<int64_t>(part) * heads + head) * plan.offsets;
    for (int i = static_cast<int>(thread_index()); i < plan.offsets; i += kThreads) {
      float sum = 0.0f;
      for (int table = 0; table < kWarps * plan.grad_tables; ++table) sum += sums[table * plan.offsets + i];
      out[i] = sum;
    }
  }

 private:
  // What the owner's rows are: `which` is 0 for those whose products are scores.
  NATTEN2_DEVICE static View owned_rows(const BackwardCall& call, int which) {
    const Forward& forward = call.args.forward;
    if constexpr (!kOwnsKeys) return which ? call.args.grad_output : forward.query;
    return which ? choose(call.plan.sees_all, forward.additional_values, forward.value)
                 : choose(call.plan.sees_all, forward.additional_keys, forward.key);
  }

  // What they are multiplied with, and what is then summed.
  NATTEN2_DEVICE static View partner_rows(const BackwardCall& call, int which, bool is_additional) {
    const Forward& forward = call.args.forward;
    if constexpr (kOwnsKeys) return which ? call.args.grad_output : forward.query;
    return which ? choose(is_additional, forward.additional_values, forward.value)
                 : choose(is_additional, forward.additional_keys, forward.key);
  }

  NATTEN2_DEVICE static int group(const Problem& problem) { return problem.heads / problem.key_heads; }

  NATTEN2_DEVICE static int64_t row_offset(const View& view, const Owned& owned, int head, const Token& token) {
    return head_offset(view, owned.tile.batch, head) + token_offset(view, owned.tile, token.position);
  }

  NATTEN2_DEVICE static void gather(const BackwardCall& call, const Layout& layout, const Owned& owned, int head) {
    const Backward& args = call.args;
    const Forward& forward = args.forward;
    const Problem& problem = forward.problem;
    const Plan& plan = call.plan;
    unsigned char* memory = shared_memory();
    auto* bias = forward.bias && !plan.sees_all ? reinterpret_cast<float*>(memory + layout.bias) : nullptr;
    const Chunks chunks(plan, owned, kOwnsKeys ? group(problem) : 1, kOwnsKeys ? 0 : problem.additional);
    const int batch = owned.tile.batch;
    NATTEN2_UNROLL
    for (int which = 0; which < 2; ++which) {
      const View rows = owned_rows(call, which);
      load_owned<Number, kChannels>(memory + layout.owned[which], rows, owned, head_offset(rows, batch, head),
                                    which ? problem.value_dim : problem.head_dim);
    }
    // The head of a chunk's partners.
    const auto partner_head = [&](int step) {
      return kOwnsKeys ? head * group(problem) + chunks.member(step) : head / group(problem);
    };
    const auto load = [&](int step, unsigned char* stage) {
      const Box chunk = chunks.find(step);
      const Numbering numbering(chunk.size);
      const bool more = chunks.is_additional(step);
      const int from = partner_head(step);
      const View views[2] = {partner_rows(call, 0, more), partner_rows(call, 1, more)};
      load_box<Number, kChannels>(stage, stage + plan.chunk_rows * kRowBytes, views,
                                  {head_offset(views[0], batch, from), head_offset(views[1], batch, from)},
                                  {problem.head_dim, problem.value_dim}, owned.tile, chunk, numbering, more);
      if constexpr (kOwnsKeys) {
        auto* numbers = reinterpret_cast<float*>(stage + 2 * plan.chunk_rows * kRowBytes);
        load_numbers(numbers, forward.logsumexp, owned.tile, chunk, numbering,
                     head_offset(forward.logsumexp, batch, from));
        load_numbers(numbers + plan.chunk_rows, args.delta, owned.tile, chunk, numbering,
                     head_offset(args.delta, batch, from));
      }
    };

    uint32_t offset[2];
    find_bias_offsets(problem, owned, kOwnsKeys ? 1 : -1, offset);
    const Upstream upstream = load_upstream(args, owned, head);
    auto* entries = reinterpret_cast<Entry*>(memory + layout.entries) + warp_index() * plan.chunk_rows;
    auto* rows = reinterpret_cast<uint16_t*>(memory + layout.rows) + warp_index() * plan.chunk_rows;
    float* sums = reinterpret_cast<float*>(memory + layout.grad_bias) + warp_index() * plan.grad_tables * plan.offsets;

    State state;
    LeftRows left[2];
    bool is_clean = false;
    for (;;) {
      start(state);
      bool is_first = true;
      int bias_head = -1;
      for_each_chunk<Number>(plan, layout, chunks.count(), block_row() / kShares, plan.step_parts, is_clean, load,
                             [&](int step, unsigned char* stage) {
                               if (is_first) {
                                 left[0].start(memory);
                                 left[1].start(memory + layout.owned[1]);
                               }
                               is_first = false;
                               const bool more = chunks.is_additional(step);
                               if (kOwnsKeys && bias && bias_head != partner_head(step)) {
                                 bias_head = partner_head(step);
                                 load_bias(bias, forward.bias + static_cast<int64_t>(bias_head) * plan.offsets,
                                           plan.offsets);
                                 sync_block();
                               }
                               const Portion<kRowBytes> portion(problem, chunks.find(step), owned, more,
                                                                kOwnsKeys ? -1 : 1, entries, rows);
                               visit(state, left, portion, stage, plan, offset, more ? nullptr : bias, upstream,
                                     plan.grad_tables > 0 && !more && !is_clean ? sums : nullptr, problem);
                             });
      if (is_clean || plan.sees_all || !any_of_block(has_nan(state))) break;
      is_clean = true;
    }
    finish(call, layout, owned, head, state);
    if (is_clean) gather_exactly(call, owned, head);
  }

  NATTEN2_DEVICE static Upstream load_upstream(const Backward& args, const Owned& owned, int head) {
    Upstream upstream = {};
    if constexpr (!kOwnsKeys) {
      NATTEN2_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Token& token = owned.tokens[warp_index() * kRows + lane_index() / 4 + 8 * half];
        const auto number = [&](const View& view) {
          return static_cast<const float*>(view.data)[row_offset(view, owned, head, token)];
        };
        upstream.logsumexp[half] = number(args.forward.logsumexp) * kLog2E;
        upstream.delta[half] = number(args.delta);
      }
    }
    return upstream;
  }

  NATTEN2_DEVICE static void start(State& state) {
    NATTEN2_UNROLL
    for (auto& sum : state.first)
      for (float& number : sum) number = 0.0f;
    NATTEN2_UNROLL
    for (auto& sum : state.second)
      for (float& number : sum) number = 0.0f;
  }

  NATTEN2_DEVICE static void visit(State& state, const LeftRows (&left)[2], const Portion<kRowBytes>& portion,
                                   unsigned char* stage, const Plan& plan, const uint32_t (&offset)[2],
                                   const float* bias, const Upstream& upstream, float* sums, const Problem& problem) {
    unsigned char* second = stage + plan.chunk_rows * kRowBytes;
    const auto* numbers = reinterpret_cast<const float*>(second + plan.chunk_rows * kRowBytes);
    const float scale = problem.scale * kLog2E;
    const int share = kShares == 1 ? 0 : block_row() % kShares;
    NATTEN2_ROLL
    for (int at = 0; at < portion.count(); at += kRows) {
      const uint16_t* offsets = portion.offsets(at);
      const typename Number::Partners partners = Number::find_partners(offsets);
      float weight[2][4], grad[2][4];
      left[0].multiply(weight, stage, partners, problem.is_exact);
      left[1].multiply(grad, second, partners, problem.is_exact);
      const auto numbers_of = [&](int j, int i) -> Numbers {
        if constexpr (!kOwnsKeys) return {upstream.logsumexp[i / 2], upstream.delta[i / 2]};
        const uint32_t row = offsets[8 * j + 2 * (lane_index() % 4) + i % 2] / kRowBytes;
        return {numbers[row] * kLog2E, numbers[plan.chunk_rows + row]};
      };
      const Pairs pairs(portion, at, offset);
      if (bias) {
        finish_scores<true>(weight, pairs, scale, bias);
        finish_gradients(weight, grad, pairs, numbers_of);
        if (!kOwnsKeys && sums) add_by_offset(sums, grad, pairs, plan);
      } else {
        finish_scores<false>(weight, pairs, scale, bias);
        finish_gradients(weight, grad, pairs, numbers_of);
      }
      if constexpr (kOwnsKeys) {
        const typename Number::Weights weights = Number::make_weights(weight, problem.is_exact);
        Number::template add_sums<kRowBytes, kColumns>(state.second, weights, second, partners, share * kColumns,
                                                       problem.is_exact);
      }
      const typename Number::Weights grads = Number::make_weights(grad, problem.is_exact);
      Number::template add_sums<kRowBytes, kColumns>(state.first, grads, stage, partners, share * kColumns,
                                                     problem.is_exact);
    }
  }

  // Turns scores into weights, and the gradients of weights into those of scores; both are 0 where hidden.
  template <class NumbersOf>
  NATTEN2_DEVICE static void finish_gradients(float (&weight)[2][4], float (&grad)[2][4], const Pairs& pairs,
                                              const NumbersOf& numbers_of) {
    NATTEN2_UNROLL
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) {
        const Numbers of_query = numbers_of(j, i);
        const float probability = power_of_two(weight[j][i] - of_query.logsumexp);
        weight[j][i] = pairs.is_visible[j][i] ? probability : 0.0f;
        grad[j][i] = pairs.is_visible[j][i] ? probability * (grad[j][i] - of_query.delta) : 0.0f;
      }
  }

  // Lanes that are equal modulo 4 hold the same key, so that each group of them takes a table, or its turn.
  NATTEN2_DEVICE static void add_by_offset(float* sums, const float (&grad)[2][4], const Pairs& pairs,
                                           const Plan& plan) {
    const int column = static_cast<int>(lane_index() % 4);
    if (plan.grad_tables == 4) sums += column * plan.offsets;
    NATTEN2_ROLL
    for (int turn = 0; turn < 4 / plan.grad_tables; ++turn) {
      const bool is_mine = plan.grad_tables == 4 || turn == column;
      NATTEN2_UNROLL
      for (int j = 0; j < 2; ++j)
        for (int i = 0; i < 4; ++i) {
          add_apart(number_at(sums, pairs.offset[j][i]), grad[j][i], is_mine && pairs.is_visible[j][i]);
        }
    }
  }

  NATTEN2_DEVICE static bool has_nan(const State& state) {
    bool result = false;
    NATTEN2_UNROLL
    for (const auto& sum : state.first)
      for (const float number : sum) result |= number != number;
    NATTEN2_UNROLL
    for (const auto& sum : state.second)
      for (const float number : sum) result |= number != number;
    return result;
  }

  NATTEN2_DEVICE static void finish(const BackwardCall& call, const Layout& layout, const Owned& owned, int head,
                                    const State& state) {
    const Backward& args = call.args;
    const Problem& problem = args.forward.problem;
    const Plan& plan = call.plan;
    unsigned char* memory = shared_memory();
    const int column = kShares == 1 ? 0 : block_row() % kShares * kColumns, batch = owned.tile.batch;
    const float scales[2] = {problem.scale, problem.scale}, ones[2] = {1.0f, 1.0f};
    if constexpr (!kOwnsKeys) {
      store_owned<Number, kChannels, kColumns>(args.grad_query, owned, head_offset(args.grad_query, batch, head),
                                               problem.head_dim, column, state.first, scales, memory);
    } else if (plan.sees_all) {
      const int64_t tokens = static_cast<int64_t>(problem.batch) * problem.additional * problem.key_heads;
      const int64_t part = block_row() / kShares;
      float* values = args.grad_additional + tokens * plan.step_parts * problem.head_dim;
      store_part(args.grad_additional + part * tokens * problem.head_dim, problem, owned, head, problem.head_dim,
                 column, state.first, problem.scale);
      store_part(values + part * tokens * problem.value_dim, problem, owned, head, problem.value_dim, column,
                 state.second, 1.0f);
    } else {
      store_owned<Number, kChannels, kColumns>(args.grad_key, owned, head_offset(args.grad_key, batch, head),
                                               problem.head_dim, column, state.first, scales, memory);
      store_owned<Number, kChannels, kColumns>(args.grad_value, owned, head_offset(args.grad_value, batch, head),
                                               problem.value_dim, column, state.second, ones, memory + layout.owned[1]);
    }
  }

  // Writes a part of the sums of additional keys, [batch, additional, key heads, channels].
  template <int kTiles>
  NATTEN2_DEVICE static void store_part(float* out, const Problem& problem, const Owned& owned, int head, int channels,
                                        int column, const float (&sum)[kTiles][4], float factor) {
    NATTEN2_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Token& token = owned.tokens[warp_index() * kRows + lane_index() / 4 + 8 * half];
      if (!token.exists) continue;
      const int64_t index = static_cast<int64_t>(owned.tile.batch) * problem.additional + token.position[kAxes - 1];
      float* row = out + (index * problem.key_heads + head) * channels;
      NATTEN2_UNROLL
      for (int n = 0; n < kTiles; ++n)
        for (int i = 0; i < 2; ++i) {
          const int channel = column + 8 * n + 2 * static_cast<int>(lane_index() % 4) + i;
          if (channel < channels) row[channel] = sum[n][2 * half + i] * factor;
        }
    }
  }

  // The owners that see what isn't finite, or hold it.
  NATTEN2_APART static void gather_exactly(const BackwardCall& call, const Owned& owned, int head) {
    using Row = Spread<Number, kChannels>;
    const Backward& args = call.args;
    const Forward& forward = args.forward;
    const Problem& problem = forward.problem;
    const Tile& tile = owned.tile;
    const int column = kShares == 1 ? 0 : block_row() % kShares * kColumns;
    NATTEN2_ROLL
    for (int row = 0; row < kRows; ++row) {
      const Token& token = owned.tokens[warp_index() * kRows + row];
      if (!token.exists) continue;
      Row own[2], partner[2], sum[2];
      NATTEN2_UNROLL
      for (int which = 0; which < 2; ++which) {
        const View rows = owned_rows(call, which);
        own[which].load(rows, row_offset(rows, owned, head, token), which ? problem.value_dim : problem.head_dim);
        sum[which].fill(0.0f);
      }
      bool sees_infinite = !own[0].is_finite() || !own[1].is_finite();
      const auto visit = [&](const int (&query)[kAxes], int query_head, float bias) {
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
      NATTEN2_ROLL
      for (int member = 0; member < (kOwnsKeys ? group(problem) : 1); ++member) {
        const int from = kOwnsKeys ? head * group(problem) + member : head / group(problem);
        const int query_head = kOwnsKeys ? from : head;
        const float* bias =
            forward.bias ? forward.bias + static_cast<int64_t>(query_head) * call.plan.offsets : nullptr;
        for_each_partner(token, [&](const int (&at)[kAxes]) {
          NATTEN2_UNROLL
          for (int which = 0; which < 2; ++which) {
            const View rows = partner_rows(call, which, false);
            partner[which].load(rows, head_offset(rows, tile.batch, from) + token_offset(rows, tile, at),
                                which ? problem.value_dim : problem.head_dim);
          }
          const auto& query = kOwnsKeys ? at : token.position;
          const auto& key = kOwnsKeys ? token.position : at;
          visit(query, query_head, bias ? bias[exact_bias_offset(problem, query, key)] : 0.0f);
        });
      }
      NATTEN2_ROLL
      for (int n = 0; n < (kOwnsKeys ? 0 : problem.additional); ++n) {
        NATTEN2_UNROLL
        for (int which = 0; which < 2; ++which) {
          const View rows = partner_rows(call, which, true);
          partner[which].load(rows, head_offset(rows, tile.batch, head / group(problem)) + n * rows.axis[kAxes - 1],
                              which ? problem.value_dim : problem.head_dim);
        }
        visit(token.position, head, 0.0f);
      }
      if (!any_of_warp(sees_infinite)) continue;
      const auto store = [&](const View& view, const Row& result, int channels, float factor) {
        result.store(view, row_offset(view, owned, head, token), column, smaller<int>(column + kColumns, channels),
                     factor);
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
    for (int channel = static_cast<int>(thread_index() % kRowLanes) * kPiece; channel < problem.value_dim;
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
  if (args.grad_logsumexp.data) sum -= static_cast<const float*>(args.grad_logsumexp.data)[offset(args.grad_logsumexp)];
  static_cast<float*>(args.delta.data)[offset(args.delta)] = sum;
}

}  // namespace natten2::cuda

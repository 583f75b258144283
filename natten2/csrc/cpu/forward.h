// Forward: each query gathers the scores of the keys it sees, takes the softmax, and sums the values.
#pragma once

#include <cmath>

#include "product.h"
#include "traverse.h"
#include "vector.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// The slots of a query: the additional keys first, then those of its window.
inline int64_t most_slots(const Problem& problem) { return problem.additional + most_found<Seek::kKeys>(problem); }

// Every query sees the additional keys, so that many queries are multiplied with them together.
inline int64_t tokens_together(const Problem& problem) {
  constexpr int64_t kQueries = 16;
  return problem.additional == 0 ? 1 : (kQueries + group_size(problem) - 1) / group_size(problem);
}

// Visits the keys of a query's window, with their slots, and the same tokens' values; returns the number of slots.
template <class Storage, class Visit>
inline int64_t for_each_slot(const Forward& args, const Neighborhood& near, int64_t key_head, Visit&& visit) {
  const Problem& problem = args.problem;
  const int64_t key_step = run_step(problem, args.key), value_step = run_step(problem, args.value);
  int64_t slot = problem.additional;
  for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
    const Storage* key = at<Storage>(args.key, run.first, key_head);
    const Storage* value = at<Storage>(args.value, run.first, key_head);
    for (int64_t j = 0; j < run.count; ++j) visit(slot++, key + j * key_step, value + j * value_step);
  });
  return slot;
}

// Writes the scores `[queries, most_slots]` of the additional keys, which are given by channel.
template <class Acc>
inline void score_additional(const Problem& problem, int64_t queries, int64_t most, const Acc* query, const Acc* keys,
                             Acc* scores) {
  const int64_t count = problem.additional, channels = problem.head_dim;
  if (count == 0) return;
  compute<Acc>({queries, count, channels, query, channels, 1, keys, count, scores, most, false});
}

// Adds the additional rows `[additional, channels]`, weighted, to the sums `[queries, channels]`.
template <class Acc>
inline void add_additional(const Problem& problem, int64_t queries, int64_t most, const Acc* weights, const Acc* rows,
                           int64_t channels, Acc* sums) {
  const int64_t count = problem.additional;
  if (count == 0) return;
  compute<Acc>({queries, channels, count, weights, most, 1, rows, channels, sums, channels, true});
}

// Writes a query's scores `[group, most_slots]` beside the products with the additional keys, which are scaled too;
// returns the number of slots.
template <class Storage, class Acc>
int64_t score_keys(const Forward& args, const Neighborhood& near, int64_t key_head, int64_t group, int64_t most,
                   const Acc* query, Acc* scores, Acc* row) {
  const Problem& problem = args.problem;
  const int64_t slots =
      for_each_slot<Storage>(args, near, key_head, [&](int64_t slot, const Storage* key, const Storage*) {
        const Acc* wide = widened(key, row, problem.head_dim);
        for (int64_t g = 0; g < group; ++g)
          scores[g * most + slot] = dot(wide, query + g * problem.head_dim, problem.head_dim);
      });
  for (int64_t g = 0; g < group; ++g) {
    Acc* score = scores + g * most;
    multiply(static_cast<Acc>(problem.scale), score, slots);
    if (!args.rpb) continue;
    score += problem.additional;
    const Acc* rpb = static_cast<const Acc*>(args.rpb) + (key_head * group + g) * offsets(problem);
    for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
      for (int64_t j = 0; j < run.count; ++j) *score++ += rpb[run.bias + j];
    });
  }
  return slots;
}

// Turns scores into weights that sum to 1, and returns their log-sum-exp.
template <class Acc>
inline Acc softmax(Acc* scores, int64_t slots) {
  if (slots == 1 && std::isfinite(scores[0])) {
    const Acc score = scores[0];
    scores[0] = 1;
    return score;
  }
  const Acc most = maximum(scores, slots);
  const Acc shift = std::isfinite(most) ? most : 0;
  const double total = exponentiate(scores, shift, slots);
  // Before the values are summed: their sum could overflow where their mean doesn't.
  multiply(static_cast<Acc>(1 / total), scores, slots);
  return static_cast<Acc>(shift + std::log(total));
}

// The same for short rows that follow each other; writes their log-sum-exps.
template <class Acc>
inline void softmax_rows(Acc* scores, int64_t rows, int64_t slots, Acc* logsumexp) {
  for (int64_t row = 0; row < rows; ++row) {
    const Acc most = maximum(scores + row * slots, slots);
    logsumexp[row] = std::isfinite(most) ? most : 0;
  }
  exponentiate_rows(scores, logsumexp, rows, slots);
  for (int64_t row = 0; row < rows; ++row) {
    Acc total = 0;
    for (int64_t i = 0; i < slots; ++i) total += scores[row * slots + i];
    multiply(1 / total, scores + row * slots, slots);
    logsumexp[row] += std::log(total);
  }
}

// Writes one row for each query head of a key head, `[group, channels]`.
template <class Storage, class Acc>
inline void load_heads(const View& view, const Token& token, int64_t key_head, int64_t group, int64_t channels,
                       Acc* out) {
  for (int64_t g = 0; g < group; ++g)
    load(at<Storage>(view, token, key_head * group + g), out + g * channels, channels);
}

template <class Storage, class Acc>
inline void store_heads(const View& view, const Token& token, int64_t key_head, int64_t group, int64_t channels,
                        const Acc* rows) {
  for (int64_t g = 0; g < group; ++g)
    store(rows + g * channels, at<Storage>(view, token, key_head * group + g), channels);
}

// Computes the outputs of one key head's queries.
template <class Storage>
class QueryOwner {
 public:
  using Acc = AccumulateType<Storage>;

  QueryOwner(const Forward& args, Arena& arena)
      : args_(args),
        problem_(args.problem),
        group_(group_size(problem_)),
        most_(most_slots(problem_)),
        tokens_together_(natten2::cpu::tokens_together(problem_)),
        query_(arena.take<Acc>(tokens_together_ * group_ * problem_.head_dim)),
        output_(arena.take<Acc>(tokens_together_ * group_ * problem_.value_dim)),
        output_sum_(group_ * problem_.value_dim, arena),
        row_(arena.take<Acc>(larger(problem_.head_dim, problem_.value_dim))),
        weights_(arena.take<Acc>(tokens_together_ * group_ * most_)),
        additional_keys_(arena.take<Acc>(problem_.additional * problem_.head_dim)),
        additional_values_(arena.take<Acc>(problem_.additional * problem_.value_dim)),
        transposed_(arena.take<Acc>(kTransposed * problem_.head_dim)),
        logsumexp_(arena.take<Acc>(group_)) {}

  void start(int64_t batch, int64_t key_head) {
    key_head_ = key_head;
    const AdditionalTokens tokens = {batch, key_head, 0, problem_.additional};
    load_columns<Storage>(args_.additional_keys, tokens, problem_.head_dim, additional_keys_, transposed_);
    load_rows<Storage>(args_.additional_values, tokens, problem_.value_dim, additional_values_);
  }

  void run(const Token& first, int64_t tokens) {
    const int64_t query_size = group_ * problem_.head_dim, output_size = group_ * problem_.value_dim;
    for (int64_t t = 0; t < tokens; ++t)
      load_heads<Storage>(args_.query, after(first, t), key_head_, group_, problem_.head_dim, query_ + t * query_size);
    score_additional(problem_, tokens * group_, most_, query_, additional_keys_, weights_);
    for (int64_t t = 0; t < tokens; ++t)
      run_window(after(first, t), query_ + t * query_size, weights_ + t * group_ * most_, output_ + t * output_size);
    add_additional(problem_, tokens * group_, most_, weights_, additional_values_, problem_.value_dim, output_);
    for (int64_t t = 0; t < tokens; ++t)
      store_heads<Storage>(args_.output, after(first, t), key_head_, group_, problem_.value_dim,
                           output_ + t * output_size);
  }

 private:
  // Finishes the weights of one token's queries, and sums the values of their window.
  void run_window(const Token& token, const Acc* query, Acc* weights, Acc* output) {
    const int64_t group = group_, most = most_, value_dim = problem_.value_dim;
    const Neighborhood near = neighborhood<Seek::kKeys>(problem_, token);
    const int64_t slots = score_keys<Storage>(args_, near, key_head_, group_, most_, query, weights, row_);
    if (1 < slots && slots < kShortRow && slots == most)
      softmax_rows(weights, group, slots, logsumexp_);
    else
      for (int64_t g = 0; g < group; ++g) logsumexp_[g] = softmax(weights + g * most, slots);
    for (int64_t g = 0; g < group; ++g) *at<Acc>(args_.logsumexp, token, key_head_ * group + g) = logsumexp_[g];

    output_sum_.clear();
    for_each_slot<Storage>(args_, near, key_head_, [&](int64_t slot, const Storage*, const Storage* value) {
      const Acc* wide = widened(value, row_, value_dim);
      Acc* sum = output_sum_.next();
      for (int64_t g = 0; g < group; ++g) add_scaled(weights[g * most + slot], wide, sum + g * value_dim, value_dim);
    });
    copy(output_sum_.total(), output, group * value_dim);
  }

  const Forward& args_;
  const Problem& problem_;
  const int64_t group_;
  const int64_t most_;  // slots
  const int64_t tokens_together_;
  int64_t key_head_ = 0;
  Acc* query_;
  Acc* output_;
  RowSum<Acc> output_sum_;
  Acc* row_;
  Acc* weights_;
  Acc* additional_keys_;  // by channel
  Acc* additional_values_;
  Acc* transposed_;
  Acc* logsumexp_;
};

// A task is a block of one key head.
template <class Storage>
struct ForwardPass {
  static int64_t count(const Forward& args) {
    return args.problem.batch * args.problem.key_heads * blocks_per_image(args.problem);
  }

  static int64_t work(const Forward& args) {
    const Problem& problem = args.problem;
    return block_tokens(problem) * most_slots(problem) * group_size(problem) * (problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Forward& args) {
    Arena arena(nullptr);
    QueryOwner<Storage>(args, arena);
    return arena.used();
  }

  static void run(const Forward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.problem;
    const int64_t blocks = blocks_per_image(problem);
    Arena arena(scratch);
    QueryOwner<Storage> owner(args, arena);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / blocks / problem.key_heads, key_head = task / blocks % problem.key_heads;
      if (task == begin || task % blocks == 0) owner.start(batch, key_head);
      for_each_piece(problem, batch * blocks + task % blocks, tokens_together(problem),
                     [&](const Token& first, int64_t tokens) { owner.run(first, tokens); });
    }
  }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// Forward: each query gathers the scores of the keys it sees, takes the softmax, and sums the values.
#pragma once

#include <cmath>

#include "traverse.h"
#include "vector.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// The query heads that share a key head are done together, so that each key and value is loaded once for all of them.
inline int64_t group_size(const Problem& problem) { return problem.heads / problem.key_heads; }

// What a query sees: the keys of its window first, then the additional ones.
inline int64_t most_slots(const Problem& problem) { return most_found<Seek::kKeys>(problem) + problem.additional; }

// Visits every key that a query sees, with the slot it goes to, and the same tokens' values.
template <class Storage, class Visit>
inline int64_t for_each_slot(const Forward& args, const Neighborhood& near, int64_t key_head, Visit&& visit) {
  const Problem& problem = args.problem;
  const int64_t key_step = run_step(problem, args.key), value_step = run_step(problem, args.value);
  int64_t slot = 0;
  for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
    const Storage* key = at<Storage>(args.key, run.first, key_head);
    const Storage* value = at<Storage>(args.value, run.first, key_head);
    for (int64_t j = 0; j < run.count; ++j) visit(slot++, key + j * key_step, value + j * value_step);
  });
  for (int64_t n = 0; n < problem.additional; ++n) {
    const Token token = {near.token.batch, {0, 0, n}};
    visit(slot++, at<Storage>(args.additional_keys, token, key_head),
          at<Storage>(args.additional_values, token, key_head));
  }
  return slot;
}

// Writes the queries `[group, head_dim]` and their scores `[group, most_slots]`; returns the number of slots.
template <class Storage, class Acc>
int64_t score_keys(const Forward& args, const Neighborhood& near, int64_t key_head, Acc* query, Acc* scores, Acc* row) {
  const Problem& problem = args.problem;
  const int64_t group = group_size(problem), most = most_slots(problem);
  for (int64_t g = 0; g < group; ++g) {
    load(at<Storage>(args.query, near.token, key_head * group + g), query + g * problem.head_dim, problem.head_dim);
  }
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
  const Acc most = maximum(scores, slots);
  const Acc shift = std::isfinite(most) ? most : 0;
  const double total = exponentiate(scores, shift, slots);
  // Before the values are summed: their sum could overflow where their mean doesn't.
  multiply(static_cast<Acc>(1 / total), scores, slots);
  return static_cast<Acc>(shift + std::log(total));
}

template <class Storage>
void forward_token(const Forward& args, const Token& token, int64_t key_head, void* memory) {
  using Acc = AccumulateType<Storage>;
  const Problem& problem = args.problem;
  const int64_t group = group_size(problem), most = most_slots(problem), value_dim = problem.value_dim;
  Scratch<Acc> scratch(memory);
  Acc* query = scratch.take(group * problem.head_dim);
  RowSum<Acc> output(scratch, group * value_dim);
  Acc* weights = scratch.take(group * most);
  Acc* row = scratch.take(larger(problem.head_dim, value_dim));

  const Neighborhood near = neighborhood<Seek::kKeys>(problem, token);
  const int64_t slots = score_keys<Storage>(args, near, key_head, query, weights, row);
  for (int64_t g = 0; g < group; ++g)
    *at<Acc>(args.logsumexp, token, key_head * group + g) = softmax(weights + g * most, slots);

  output.clear();
  for_each_slot<Storage>(args, near, key_head, [&](int64_t slot, const Storage*, const Storage* value) {
    const Acc* wide = widened(value, row, value_dim);
    Acc* sum = output.next();
    for (int64_t g = 0; g < group; ++g) add_scaled(weights[g * most + slot], wide, sum + g * value_dim, value_dim);
  });
  const Acc* total = output.total();
  for (int64_t g = 0; g < group; ++g)
    store(total + g * value_dim, at<Storage>(args.output, token, key_head * group + g), value_dim);
}

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
    const Problem& problem = args.problem;
    const int64_t per_head =
        problem.head_dim + RowSum<AccumulateType<Storage>>::scratch_size(problem.value_dim) + most_slots(problem);
    const int64_t row = larger(problem.head_dim, problem.value_dim);
    return (group_size(problem) * per_head + row) * sizeof(AccumulateType<Storage>);
  }

  static void run(const Forward& args, int64_t begin, int64_t end, void* scratch) {
    for (int64_t task = begin; task < end; ++task)
      for_each_token_and_key_head(args.problem, task, [&](const Token& token, int64_t key_head) {
        forward_token<Storage>(args, token, key_head, scratch);
      });
  }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

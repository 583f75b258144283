// Forward: each query gathers the scores of the keys it sees, takes the softmax, and sums the values.
#pragma once

#include <cmath>

#include "traverse.h"
#include "vector.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// What a query sees: the keys of its window first, then the additional ones.
inline int64_t most_slots(const Problem& problem) { return most_found<Seek::kKeys>(problem) + problem.additional; }

// Writes the scores of every slot and returns how many there are; `query` is scaled.
template <class Storage, class Acc>
inline int64_t score_keys(const Forward& args, const Neighborhood& near, int64_t head, const Acc* query, Acc* scores) {
  const Problem& problem = args.problem;
  const int64_t key_head = head / (problem.heads / problem.key_heads);
  const int64_t key_step = run_step(problem, args.key);
  const Acc* rpb = static_cast<const Acc*>(args.rpb);
  if (rpb) rpb += head * offsets(problem);
  int64_t slots = 0;
  for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
    const Storage* key = at<Storage>(args.key, run.first, key_head);
    for (int64_t j = 0; j < run.count; ++j) scores[slots + j] = dot(key + j * key_step, query, problem.head_dim);
    if (rpb)
      for (int64_t j = 0; j < run.count; ++j) scores[slots + j] += rpb[run.bias + j];
    slots += run.count;
  });
  for (int64_t n = 0; n < problem.additional; ++n) {
    const Storage* key = at<Storage>(args.additional_keys, {near.token.batch, {0, 0, n}}, key_head);
    scores[slots++] = dot(key, query, problem.head_dim);
  }
  return slots;
}

template <class Storage>
void forward_query(const Forward& args, const Token& token, int64_t head, AccumulateType<Storage>* scratch) {
  using Acc = AccumulateType<Storage>;
  const Problem& problem = args.problem;
  const int64_t key_head = head / (problem.heads / problem.key_heads);
  Acc* query = scratch;
  Acc* sum = query + problem.head_dim;
  Acc* weights = sum + problem.value_dim;

  load_scaled(at<Storage>(args.query, token, head), static_cast<Acc>(problem.scale), query, problem.head_dim);
  const Neighborhood near = neighborhood<Seek::kKeys>(problem, token);
  const int64_t slots = score_keys<Storage>(args, near, head, query, weights);
  const Acc most = maximum(weights, slots);
  const Acc shift = std::isfinite(most) ? most : 0;
  const Acc total = exponentiate(weights, shift, slots);
  *at<Acc>(args.logsumexp, token, head) = shift + std::log(total);
  // Before the values, whose sum could overflow where their mean doesn't.
  load_scaled(weights, 1 / total, weights, slots);

  fill_zero(sum, problem.value_dim);
  const Acc* weight = weights;
  const int64_t value_step = run_step(problem, args.value);
  for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
    const Storage* value = at<Storage>(args.value, run.first, key_head);
    for (int64_t j = 0; j < run.count; ++j) add_scaled(*weight++, value + j * value_step, sum, problem.value_dim);
  });
  for (int64_t n = 0; n < problem.additional; ++n) {
    const Storage* value = at<Storage>(args.additional_values, {token.batch, {0, 0, n}}, key_head);
    add_scaled(*weight++, value, sum, problem.value_dim);
  }
  store_scaled(sum, Acc(1), at<Storage>(args.output, token, head), problem.value_dim);
}

template <class Storage>
struct ForwardPass {
  static int64_t count(const Forward& args) {
    return args.problem.batch * args.problem.heads * blocks_per_image(args.problem);
  }

  static int64_t work(const Forward& args) {
    const Problem& problem = args.problem;
    return block_tokens(problem) * most_slots(problem) * (problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Forward& args) {
    const Problem& problem = args.problem;
    return (problem.head_dim + problem.value_dim + most_slots(problem)) * sizeof(AccumulateType<Storage>);
  }

  static void run(const Forward& args, int64_t begin, int64_t end, void* scratch) {
    const auto visit = [&](const Token& token, int64_t head) {
      forward_query<Storage>(args, token, head, static_cast<AccumulateType<Storage>*>(scratch));
    };
    for (int64_t task = begin; task < end; ++task)
      for_each_token_and_head(args.problem, args.problem.heads, task, visit);
  }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

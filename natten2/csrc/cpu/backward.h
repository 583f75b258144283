// Backward, without atomics: every gradient is gathered by its owner. Queries gather theirs, and the bias's, from the
// keys they see; keys and values gather theirs from the queries that see them.
#pragma once

#include "forward.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// delta = sum(output * grad_output) - grad_logsumexp, the part of the softmax's gradient that is the same for every
// key.
template <class Storage, class Acc>
inline Acc write_delta(const Backward& args, const Token& token, int64_t head, const Acc* grad_output) {
  const Storage* output = at<Storage>(args.forward.output, token, head);
  Acc delta = dot(output, grad_output, args.forward.problem.value_dim);
  if (args.grad_logsumexp.data) delta -= *at<Acc>(args.grad_logsumexp, token, head);
  return *at<Acc>(args.delta, token, head) = delta;
}

template <class Storage>
void backward_query(const Backward& args, const Token& token, int64_t head, double* grad_rpb,
                    AccumulateType<Storage>* scratch) {
  using Acc = AccumulateType<Storage>;
  const Forward& forward = args.forward;
  const Problem& problem = forward.problem;
  const int64_t key_head = head / (problem.heads / problem.key_heads);
  Acc* query = scratch;
  Acc* grad_query = query + problem.head_dim;
  Acc* grad_output = grad_query + problem.head_dim;
  Acc* weights = grad_output + problem.value_dim;
  const Acc scale = static_cast<Acc>(problem.scale);

  load_scaled(at<Storage>(forward.query, token, head), scale, query, problem.head_dim);
  load_scaled(at<Storage>(args.grad_output, token, head), Acc(1), grad_output, problem.value_dim);
  const Acc delta = write_delta<Storage>(args, token, head, grad_output);
  const Neighborhood near = neighborhood<Seek::kKeys>(problem, token);
  const int64_t slots = score_keys<Storage>(forward, near, head, query, weights);
  exponentiate(weights, *at<Acc>(forward.logsumexp, token, head), slots);

  fill_zero(grad_query, problem.head_dim);
  const auto grad_score = [&](Acc weight, const Storage* key, const Storage* value) {
    const Acc grad = weight * (dot(value, grad_output, problem.value_dim) - delta);
    add_scaled(grad, key, grad_query, problem.head_dim);
    return grad;
  };
  const Acc* weight = weights;
  const int64_t key_step = run_step(problem, forward.key), value_step = run_step(problem, forward.value);
  for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
    const Storage* key = at<Storage>(forward.key, run.first, key_head);
    const Storage* value = at<Storage>(forward.value, run.first, key_head);
    for (int64_t j = 0; j < run.count; ++j) {
      const Acc grad = grad_score(*weight++, key + j * key_step, value + j * value_step);
      if (grad_rpb) grad_rpb[run.bias + j] += grad;
    }
  });
  for (int64_t n = 0; n < problem.additional; ++n) {
    const Token extra = {token.batch, {0, 0, n}};
    grad_score(*weight++, at<Storage>(forward.additional_keys, extra, key_head),
               at<Storage>(forward.additional_values, extra, key_head));
  }
  store_scaled(grad_query, scale, at<Storage>(args.grad_query, token, head), problem.head_dim);
}

// A task is one head's share of all blocks: with a bias, the part that its gradient is summed over.
template <class Storage>
struct GradQueryPass {
  static int64_t count(const Backward& args) { return args.forward.problem.heads * args.parts; }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    const int64_t blocks = problem.batch * blocks_per_image(problem) / args.parts + 1;
    return blocks * block_tokens(problem) * most_slots(problem) * (2 * problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return (2 * problem.head_dim + problem.value_dim + most_slots(problem)) * sizeof(AccumulateType<Storage>);
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.forward.problem;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / args.parts, part = task % args.parts;
      double* grad_rpb = args.grad_rpb_parts;
      if (grad_rpb) {
        grad_rpb += task * offsets(problem);
        fill_zero(grad_rpb, offsets(problem));
      }
      const auto visit = [&](const Token& token) {
        backward_query<Storage>(args, token, head, grad_rpb, static_cast<AccumulateType<Storage>*>(scratch));
      };
      // Rounded so that all parts together are all blocks, each once.
      const int64_t blocks = problem.batch * blocks_per_image(problem);
      for (int64_t block = blocks * part / args.parts; block < blocks * (part + 1) / args.parts; ++block)
        for_each_token(problem, block, visit);
    }
  }
};

// One key with its value, in the accumulation type, and the sums of their gradients.
template <class Storage>
struct KeyOwner {
  using Acc = AccumulateType<Storage>;

  const Backward& args;
  Acc* key;  // scaled
  Acc* value;
  Acc* grad_key;
  Acc* grad_value;
  Acc* weights;

  static int64_t scratch_size(const Problem& problem) { return 2 * (problem.head_dim + problem.value_dim); }

  KeyOwner(const Backward& args, void* scratch) : args(args) {
    const Problem& problem = args.forward.problem;
    key = static_cast<Acc*>(scratch);
    value = key + problem.head_dim;
    grad_key = value + problem.value_dim;
    grad_value = grad_key + problem.head_dim;
    weights = grad_value + problem.value_dim;
  }

  void load(const Storage* key_source, const Storage* value_source) {
    const Problem& problem = args.forward.problem;
    load_scaled(key_source, static_cast<Acc>(problem.scale), key, problem.head_dim);
    load_scaled(value_source, Acc(1), value, problem.value_dim);
    fill_zero(grad_key, problem.head_dim);
    fill_zero(grad_value, problem.value_dim);
  }

  // A score less the query's log-sum-exp, so that its exponential is the weight.
  Acc centered_score(const Token& query, int64_t head) const {
    return dot(at<Storage>(args.forward.query, query, head), key, args.forward.problem.head_dim) -
           *at<Acc>(args.forward.logsumexp, query, head);
  }

  void add(const Token& query, int64_t head, Acc weight) {
    const Problem& problem = args.forward.problem;
    const Storage* grad_output = at<Storage>(args.grad_output, query, head);
    const Acc grad = weight * (dot(grad_output, value, problem.value_dim) - *at<Acc>(args.delta, query, head));
    add_scaled(grad, at<Storage>(args.forward.query, query, head), grad_key, problem.head_dim);
    add_scaled(weight, grad_output, grad_value, problem.value_dim);
  }

  void store(Storage* key_target, Storage* value_target) const {
    const Problem& problem = args.forward.problem;
    store_scaled(grad_key, static_cast<Acc>(problem.scale), key_target, problem.head_dim);
    store_scaled(grad_value, Acc(1), value_target, problem.value_dim);
  }
};

template <class Storage>
void backward_key_value(const Backward& args, const Token& token, int64_t key_head, void* scratch) {
  using Acc = AccumulateType<Storage>;
  const Forward& forward = args.forward;
  const Problem& problem = forward.problem;
  const int64_t group = problem.heads / problem.key_heads, dilation = problem.axes[2].dilation;
  const Neighborhood near = neighborhood<Seek::kQueries>(problem, token);
  KeyOwner<Storage> owner(args, scratch);
  owner.load(at<Storage>(forward.key, token, key_head), at<Storage>(forward.value, token, key_head));
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    const Acc* rpb = static_cast<const Acc*>(forward.rpb);
    if (rpb) rpb += head * offsets(problem);
    int64_t found = 0;
    for_each_run<Seek::kQueries>(problem, near, [&](const Run& run) {
      Token query = run.first;
      for (int64_t j = 0; j < run.count; ++j, query.index[2] += dilation) {
        owner.weights[found + j] = owner.centered_score(query, head);
        if (rpb) owner.weights[found + j] += rpb[run.bias + j * run.bias_step];
      }
      found += run.count;
    });
    exponentiate(owner.weights, Acc(0), found);
    const Acc* weight = owner.weights;
    for_each_run<Seek::kQueries>(problem, near, [&](const Run& run) {
      Token query = run.first;
      for (int64_t j = 0; j < run.count; ++j, query.index[2] += dilation) owner.add(query, head, *weight++);
    });
  }
  owner.store(at<Storage>(args.grad_key, token, key_head), at<Storage>(args.grad_value, token, key_head));
}

template <class Storage>
struct GradKeyValuePass {
  static int64_t count(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return problem.batch * problem.key_heads * blocks_per_image(problem);
  }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return block_tokens(problem) * most_found<Seek::kKeys>(problem) * (problem.heads / problem.key_heads) * 2 *
           (problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return (KeyOwner<Storage>::scratch_size(problem) + most_found<Seek::kQueries>(problem)) *
           sizeof(AccumulateType<Storage>);
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.forward.problem;
    const auto visit = [&](const Token& token, int64_t key_head) {
      backward_key_value<Storage>(args, token, key_head, scratch);
    };
    for (int64_t task = begin; task < end; ++task) for_each_token_and_head(problem, problem.key_heads, task, visit);
  }
};

// Additional keys and values are seen by every query: a task is one of them, for one key head.
template <class Storage>
struct GradAdditionalPass {
  using Acc = AccumulateType<Storage>;

  static int64_t count(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return problem.batch * problem.key_heads * problem.additional;
  }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return blocks_per_image(problem) * block_tokens(problem) * (problem.heads / problem.key_heads) * 2 *
           (problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    return (KeyOwner<Storage>::scratch_size(args.forward.problem) + kBlock) * sizeof(Acc);
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Forward& forward = args.forward;
    const Problem& problem = forward.problem;
    const int64_t group = problem.heads / problem.key_heads;
    KeyOwner<Storage> owner(args, scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / problem.additional % problem.key_heads;
      const Token extra = {task / problem.additional / problem.key_heads, {0, 0, task % problem.additional}};
      owner.load(at<Storage>(forward.additional_keys, extra, key_head),
                 at<Storage>(forward.additional_values, extra, key_head));
      const int64_t blocks = blocks_per_image(problem);
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
        for (int64_t block = extra.batch * blocks; block < (extra.batch + 1) * blocks; ++block)
          add_block(owner, block, head);
      owner.store(at<Storage>(args.grad_additional_keys, extra, key_head),
                  at<Storage>(args.grad_additional_values, extra, key_head));
    }
  }

 private:
  static void add_block(KeyOwner<Storage>& owner, int64_t block, int64_t head) {
    const Problem& problem = owner.args.forward.problem;
    int64_t count = 0;
    for_each_token(problem, block,
                   [&](const Token& query) { owner.weights[count++] = owner.centered_score(query, head); });
    exponentiate(owner.weights, Acc(0), count);
    const Acc* weight = owner.weights;
    for_each_token(problem, block, [&](const Token& query) { owner.add(query, head, *weight++); });
  }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

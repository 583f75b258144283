// Backward, without atomics: every gradient is gathered by its owner. Queries gather theirs, and the bias's, from the
// keys they see; keys and values gather theirs from the queries that see them.
#pragma once

#include "forward.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// delta = sum(output * grad_output) - grad_logsumexp, the part of the softmax's gradient that is the same for every
// key.
template <class Storage, class Acc>
inline Acc write_delta(const Backward& args, const Token& token, int64_t head, const Acc* grad_output, Acc* row) {
  const int64_t value_dim = args.forward.problem.value_dim;
  Acc delta = dot(widened(at<Storage>(args.forward.output, token, head), row, value_dim), grad_output, value_dim);
  if (args.grad_logsumexp.data) delta -= *at<Acc>(args.grad_logsumexp, token, head);
  return *at<Acc>(args.delta, token, head) = delta;
}

// Adds the gradients of a query's scores, `[slots]`, to those of the bias entries that they hold.
template <class Acc>
inline void add_offsets(const Problem& problem, const Neighborhood& near, const Acc* grad_scores, double* grad_rpb) {
  for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
    for (int64_t j = 0; j < run.count; ++j) grad_rpb[run.bias + j] += *grad_scores++;
  });
}

// `grad_rpb` is null or this part's sums for every head, `head_stride` apart.
template <class Storage>
void backward_token(const Backward& args, const Token& token, int64_t key_head, double* grad_rpb, int64_t head_stride,
                    void* memory) {
  using Acc = AccumulateType<Storage>;
  const Forward& forward = args.forward;
  const Problem& problem = forward.problem;
  const int64_t group = group_size(problem), most = most_slots(problem);
  const int64_t head_dim = problem.head_dim, value_dim = problem.value_dim;
  Scratch<Acc> scratch(memory);
  Acc* query = scratch.take(group * head_dim);
  RowSum<Acc> grad_query(scratch, group * head_dim);
  Acc* grad_output = scratch.take(group * value_dim);
  Acc* delta = scratch.take(group);
  Acc* weights = scratch.take(group * most);
  Acc* key_row = scratch.take(head_dim);
  Acc* value_row = scratch.take(value_dim);

  const Neighborhood near = neighborhood<Seek::kKeys>(problem, token);
  const int64_t slots = score_keys<Storage>(forward, near, key_head, query, weights, key_row);
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = key_head * group + g;
    load(at<Storage>(args.grad_output, token, head), grad_output + g * value_dim, value_dim);
    delta[g] = write_delta<Storage>(args, token, head, grad_output + g * value_dim, value_row);
    exponentiate(weights + g * most, *at<Acc>(forward.logsumexp, token, head), slots);
  }

  grad_query.clear();
  for_each_slot<Storage>(forward, near, key_head, [&](int64_t slot, const Storage* key, const Storage* value) {
    const Acc* wide_key = widened(key, key_row, head_dim);
    const Acc* wide_value = widened(value, value_row, value_dim);
    Acc* sum = grad_query.next();
    for (int64_t g = 0; g < group; ++g) {
      Acc& weight = weights[g * most + slot];
      // From here on the gradient of the score takes the weight's place.
      weight *= dot(wide_value, grad_output + g * value_dim, value_dim) - delta[g];
      add_scaled(weight, wide_key, sum + g * head_dim, head_dim);
    }
  });
  Acc* total = grad_query.total();
  multiply(static_cast<Acc>(problem.scale), total, group * head_dim);
  for (int64_t g = 0; g < group; ++g) {
    if (grad_rpb) add_offsets(problem, near, weights + g * most, grad_rpb + (key_head * group + g) * head_stride);
    store(total + g * head_dim, at<Storage>(args.grad_query, token, key_head * group + g), head_dim);
  }
}

// A task is a share of all blocks, for one key head: with a bias, the part that its gradient is summed over.
template <class Storage>
struct GradQueryPass {
  static int64_t count(const Backward& args) { return args.forward.problem.key_heads * args.parts; }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    const int64_t blocks = problem.batch * blocks_per_image(problem) / args.parts + 1;
    return blocks * block_tokens(problem) * most_slots(problem) * group_size(problem) *
           (2 * problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    const Problem& problem = args.forward.problem;
    const int64_t sum = RowSum<AccumulateType<Storage>>::scratch_size(problem.head_dim);
    const int64_t per_head = problem.head_dim + sum + problem.value_dim + 1 + most_slots(problem);
    return (group_size(problem) * per_head + problem.head_dim + problem.value_dim) * sizeof(AccumulateType<Storage>);
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.forward.problem;
    const int64_t group = group_size(problem), head_stride = args.parts * offsets(problem);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / args.parts, part = task % args.parts;
      double* grad_rpb = args.grad_rpb_parts;
      if (grad_rpb) {
        grad_rpb += part * offsets(problem);
        for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
          fill_zero(grad_rpb + head * head_stride, offsets(problem));
      }
      // Rounded so that all parts together are all blocks, each once.
      const int64_t blocks = problem.batch * blocks_per_image(problem);
      for (int64_t block = blocks * part / args.parts; block < blocks * (part + 1) / args.parts; ++block)
        for_each_token(problem, block, [&](const Token& token) {
          backward_token<Storage>(args, token, key_head, grad_rpb, head_stride, scratch);
        });
    }
  }
};

// One key with its value, in the accumulation type, and the sums of their gradients.
template <class Storage>
class KeyOwner {
 public:
  using Acc = AccumulateType<Storage>;

  static int64_t scratch_size(const Problem& problem) {
    const int64_t size = problem.head_dim + problem.value_dim;
    return 2 * size + RowSum<Acc>::scratch_size(size);
  }

  KeyOwner(const Backward& args, void* memory) : KeyOwner(args, Scratch<Acc>(memory)) {}

  void start(const Storage* key, const Storage* value) {
    load(key, key_, head_dim_);
    load(value, value_, value_dim_);
    grads_.clear();
  }

  // A score less the query's log-sum-exp, so that its exponential is the weight.
  Acc centered_score(const Token& query, int64_t head) {
    const Acc* wide = widened(at<Storage>(args_.forward.query, query, head), query_row_, head_dim_);
    return scale_ * dot(wide, key_, head_dim_) - *at<Acc>(args_.forward.logsumexp, query, head);
  }

  void add(const Token& query, int64_t head, Acc weight) {
    const Acc* wide_query = widened(at<Storage>(args_.forward.query, query, head), query_row_, head_dim_);
    const Acc* wide_grad = widened(at<Storage>(args_.grad_output, query, head), grad_row_, value_dim_);
    const Acc grad_score = weight * (dot(wide_grad, value_, value_dim_) - *at<Acc>(args_.delta, query, head));
    Acc* sum = grads_.next();
    add_scaled(grad_score, wide_query, sum, head_dim_);
    add_scaled(weight, wide_grad, sum + head_dim_, value_dim_);
  }

  void finish(Storage* grad_key, Storage* grad_value) {
    Acc* total = grads_.total();
    multiply(scale_, total, head_dim_);
    store(total, grad_key, head_dim_);
    store(total + head_dim_, grad_value, value_dim_);
  }

  const Backward& args() const { return args_; }

  // Room for the weights of the queries, behind the rest of the scratch memory.
  Acc* weights() const { return weights_; }

 private:
  KeyOwner(const Backward& args, Scratch<Acc> scratch)
      : args_(args),
        head_dim_(args.forward.problem.head_dim),
        value_dim_(args.forward.problem.value_dim),
        scale_(static_cast<Acc>(args.forward.problem.scale)),
        key_(scratch.take(head_dim_)),
        value_(scratch.take(value_dim_)),
        query_row_(scratch.take(head_dim_)),
        grad_row_(scratch.take(value_dim_)),
        grads_(scratch, head_dim_ + value_dim_),
        weights_(scratch.next) {}

  const Backward& args_;
  const int64_t head_dim_;
  const int64_t value_dim_;
  const Acc scale_;
  Acc* key_;
  Acc* value_;
  Acc* query_row_;
  Acc* grad_row_;
  RowSum<Acc> grads_;  // of the key, then of the value
  Acc* weights_;
};

template <class Storage>
void backward_key_value(const Backward& args, const Token& token, int64_t key_head, void* scratch) {
  using Acc = AccumulateType<Storage>;
  const Forward& forward = args.forward;
  const Problem& problem = forward.problem;
  const int64_t group = group_size(problem), dilation = problem.axes[kAxes - 1].dilation;
  const Neighborhood near = neighborhood<Seek::kQueries>(problem, token);
  KeyOwner<Storage> owner(args, scratch);
  owner.start(at<Storage>(forward.key, token, key_head), at<Storage>(forward.value, token, key_head));
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    const Acc* rpb = static_cast<const Acc*>(forward.rpb);
    if (rpb) rpb += head * offsets(problem);
    int64_t found = 0;
    for_each_run<Seek::kQueries>(problem, near, [&](const Run& run) {
      Token query = run.first;
      for (int64_t j = 0; j < run.count; ++j, query.index[2] += dilation) {
        owner.weights()[found + j] = owner.centered_score(query, head);
        if (rpb) owner.weights()[found + j] += rpb[run.bias + j * run.bias_step];
      }
      found += run.count;
    });
    exponentiate(owner.weights(), Acc(0), found);
    const Acc* weight = owner.weights();
    for_each_run<Seek::kQueries>(problem, near, [&](const Run& run) {
      Token query = run.first;
      for (int64_t j = 0; j < run.count; ++j, query.index[2] += dilation) owner.add(query, head, *weight++);
    });
  }
  owner.finish(at<Storage>(args.grad_key, token, key_head), at<Storage>(args.grad_value, token, key_head));
}

template <class Storage>
struct GradKeyValuePass {
  static int64_t count(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return problem.batch * problem.key_heads * blocks_per_image(problem);
  }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return block_tokens(problem) * most_found<Seek::kKeys>(problem) * group_size(problem) * 2 *
           (problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return (KeyOwner<Storage>::scratch_size(problem) + most_found<Seek::kQueries>(problem)) *
           sizeof(AccumulateType<Storage>);
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    for (int64_t task = begin; task < end; ++task)
      for_each_token_and_key_head(args.forward.problem, task, [&](const Token& token, int64_t key_head) {
        backward_key_value<Storage>(args, token, key_head, scratch);
      });
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
    return blocks_per_image(problem) * block_tokens(problem) * group_size(problem) * 2 *
           (problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    return (KeyOwner<Storage>::scratch_size(args.forward.problem) + kBlock) * sizeof(Acc);
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Forward& forward = args.forward;
    const Problem& problem = forward.problem;
    const int64_t group = group_size(problem), blocks = blocks_per_image(problem);
    KeyOwner<Storage> owner(args, scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / problem.additional % problem.key_heads;
      const Token extra = {task / problem.additional / problem.key_heads, {0, 0, task % problem.additional}};
      owner.start(at<Storage>(forward.additional_keys, extra, key_head),
                  at<Storage>(forward.additional_values, extra, key_head));
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
        for (int64_t block = extra.batch * blocks; block < (extra.batch + 1) * blocks; ++block)
          add_block(owner, block, head);
      owner.finish(at<Storage>(args.grad_additional_keys, extra, key_head),
                   at<Storage>(args.grad_additional_values, extra, key_head));
    }
  }

 private:
  static void add_block(KeyOwner<Storage>& owner, int64_t block, int64_t head) {
    const Problem& problem = owner.args().forward.problem;
    int64_t count = 0;
    for_each_token(problem, block,
                   [&](const Token& query) { owner.weights()[count++] = owner.centered_score(query, head); });
    exponentiate(owner.weights(), Acc(0), count);
    const Acc* weight = owner.weights();
    for_each_token(problem, block, [&](const Token& query) { owner.add(query, head, *weight++); });
  }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

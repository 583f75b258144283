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

// Turns weights into gradients of scores.
template <class Acc>
inline void multiply_centered(const Acc* grad_weights, Acc delta, Acc* weights, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) weights[i] *= grad_weights[i] - delta;
}

// Where one part's gradient of the bias is summed: null, or every head's, `head_stride` apart.
struct BiasSums {
  double* data;
  int64_t head_stride;
};

// Computes the gradients of one key head's queries.
template <class Storage>
class GradQueryOwner {
 public:
  using Acc = AccumulateType<Storage>;

  GradQueryOwner(const Backward& args, Arena& arena)
      : args_(args),
        problem_(args.forward.problem),
        group_(group_size(problem_)),
        most_(most_slots(problem_)),
        tokens_together_(natten2::cpu::tokens_together(problem_)),
        query_(arena.take<Acc>(tokens_together_ * group_ * problem_.head_dim)),
        grad_query_(arena.take<Acc>(tokens_together_ * group_ * problem_.head_dim)),
        grad_output_(arena.take<Acc>(tokens_together_ * group_ * problem_.value_dim)),
        grad_query_sum_(group_ * problem_.head_dim, arena),
        key_row_(arena.take<Acc>(problem_.head_dim)),
        value_row_(arena.take<Acc>(problem_.value_dim)),
        weights_(arena.take<Acc>(tokens_together_ * group_ * most_)),
        grad_weights_(arena.take<Acc>(tokens_together_ * group_ * problem_.additional)),
        additional_keys_(arena.take<Acc>(problem_.additional * problem_.head_dim)),
        keys_by_channel_(arena.take<Acc>(problem_.additional * problem_.head_dim)),
        values_by_channel_(arena.take<Acc>(problem_.additional * problem_.value_dim)),
        transposed_(arena.take<Acc>(kTransposed * larger(problem_.head_dim, problem_.value_dim))),
        delta_(arena.take<Acc>(group_)),
        logsumexp_(arena.take<Acc>(group_)) {}

  void start(int64_t batch, int64_t key_head) {
    batch_ = batch;
    key_head_ = key_head;
    const AdditionalTokens tokens = {batch, key_head, 0, problem_.additional};
    const View &keys = args_.forward.additional_keys, &values = args_.forward.additional_values;
    load_rows<Storage>(keys, tokens, problem_.head_dim, additional_keys_);
    load_columns<Storage>(keys, tokens, problem_.head_dim, keys_by_channel_, transposed_);
    load_columns<Storage>(values, tokens, problem_.value_dim, values_by_channel_, transposed_);
  }

  bool started(int64_t batch, int64_t key_head) const { return batch == batch_ && key_head == key_head_; }

  void run(const Token& first, int64_t tokens, const BiasSums& grad_rpb) {
    const int64_t group = group_, head_dim = problem_.head_dim, value_dim = problem_.value_dim;
    const int64_t queries = tokens * group;
    for (int64_t t = 0; t < tokens; ++t) {
      load_heads<Storage>(args_.forward.query, after(first, t), key_head_, group_, head_dim,
                          query_ + t * group * head_dim);
      load_heads<Storage>(args_.grad_output, after(first, t), key_head_, group_, value_dim,
                          grad_output_ + t * group * value_dim);
    }
    score_additional(problem_, queries, most_, query_, keys_by_channel_, weights_);
    differentiate_additional(queries);
    for (int64_t t = 0; t < tokens; ++t) run_token(after(first, t), t * group, grad_rpb);
    add_additional(problem_, queries, most_, weights_, additional_keys_, head_dim, grad_query_);
    multiply(static_cast<Acc>(problem_.scale), grad_query_, queries * head_dim);
    for (int64_t t = 0; t < tokens; ++t)
      store_heads<Storage>(args_.grad_query, after(first, t), key_head_, group_, head_dim,
                           grad_query_ + t * group * head_dim);
  }

 private:
  // Writes the products of the queries' grad_output with the additional values.
  void differentiate_additional(int64_t queries) {
    const int64_t count = problem_.additional, channels = problem_.value_dim;
    if (count == 0) return;
    compute<Acc>(
        {queries, count, channels, grad_output_, channels, 1, values_by_channel_, count, grad_weights_, count, false});
  }

  // Turns the scores of a token's queries, of which `query` is the first, into their gradients, and sums the window's
  // part of the queries' own.
  void run_token(const Token& token, int64_t query, const BiasSums& grad_rpb) {
    const int64_t group = group_, most = most_, additional = problem_.additional;
    const int64_t head_dim = problem_.head_dim, value_dim = problem_.value_dim;
    const Acc* grad_output = grad_output_ + query * value_dim;
    Acc* weights = weights_ + query * most;
    Acc* delta = delta_;
    const Neighborhood near = neighborhood<Seek::kKeys>(problem_, token);
    const int64_t slots = score_keys<Storage>(args_.forward, near, key_head_, group_, most_, query_ + query * head_dim,
                                              weights, key_row_);
    for (int64_t g = 0; g < group; ++g) logsumexp_[g] = *at<Acc>(args_.forward.logsumexp, token, key_head_ * group + g);
    if (slots < kShortRow && slots == most)
      exponentiate_rows(weights, logsumexp_, group, slots);
    else
      for (int64_t g = 0; g < group; ++g) exponentiate(weights + g * most, logsumexp_[g], slots);
    for (int64_t g = 0; g < group; ++g) {
      const int64_t head = key_head_ * group + g;
      delta[g] = write_delta<Storage>(args_, token, head, grad_output + g * value_dim, value_row_);
      multiply_centered(grad_weights_ + (query + g) * additional, delta[g], weights + g * most, additional);
    }

    grad_query_sum_.clear();
    for_each_slot<Storage>(args_.forward, near, key_head_, [&](int64_t slot, const Storage* key, const Storage* value) {
      const Acc* wide_key = widened(key, key_row_, head_dim);
      const Acc* wide_value = widened(value, value_row_, value_dim);
      Acc* sum = grad_query_sum_.next();
      for (int64_t g = 0; g < group; ++g) {
        Acc& weight = weights[g * most + slot];
        // From here on the gradient of the score takes the weight's place.
        weight *= dot(wide_value, grad_output + g * value_dim, value_dim) - delta[g];
        add_scaled(weight, wide_key, sum + g * head_dim, head_dim);
      }
    });
    copy(grad_query_sum_.total(), grad_query_ + query * head_dim, group * head_dim);
    if (!grad_rpb.data) return;
    for (int64_t g = 0; g < group; ++g)
      add_offsets(problem_, near, weights + g * most + additional,
                  grad_rpb.data + (key_head_ * group + g) * grad_rpb.head_stride);
  }

  const Backward& args_;
  const Problem& problem_;
  const int64_t group_;
  const int64_t most_;  // slots
  const int64_t tokens_together_;
  int64_t batch_ = -1;
  int64_t key_head_ = -1;
  Acc* query_;
  Acc* grad_query_;
  Acc* grad_output_;
  RowSum<Acc> grad_query_sum_;
  Acc* key_row_;
  Acc* value_row_;
  Acc* weights_;
  Acc* grad_weights_;  // of the additional keys
  Acc* additional_keys_;
  Acc* keys_by_channel_;
  Acc* values_by_channel_;
  Acc* transposed_;
  Acc* delta_;
  Acc* logsumexp_;
};

// A task is a share of all blocks, for one key head: with a bias, the part that its gradient is summed over.
template <class Storage>
struct GradQueryPass {
  // How many parts the bias's gradient is summed in: enough for many threads, few enough to fit in memory, and the same
  // for any number of threads, so that the sum is too.
  static int64_t parts(const Problem& problem) {
    constexpr int64_t kTasks = 256, kMostEntries = int64_t{1} << 22;
    const int64_t wanted = (kTasks + problem.key_heads - 1) / problem.key_heads;
    return larger(1, smaller(wanted, kMostEntries / (problem.heads * offsets(problem))));
  }

  static int64_t count(const Backward& args) { return args.forward.problem.key_heads * args.parts; }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    const int64_t blocks = problem.batch * blocks_per_image(problem) / args.parts + 1;
    return blocks * block_tokens(problem) * most_slots(problem) * group_size(problem) *
           (2 * problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    Arena arena(nullptr);
    GradQueryOwner<Storage>(args, arena);
    return arena.used();
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.forward.problem;
    Arena arena(scratch);
    GradQueryOwner<Storage> owner(args, arena);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t key_head = task / args.parts, part = task % args.parts;
      const BiasSums grad_rpb = sums(args, part);
      // Rounded so that all parts together are all blocks, each once.
      const int64_t blocks = problem.batch * blocks_per_image(problem);
      for (int64_t block = blocks * part / args.parts; block < blocks * (part + 1) / args.parts; ++block) {
        const int64_t batch = block / blocks_per_image(problem);
        if (!owner.started(batch, key_head)) owner.start(batch, key_head);
        for_each_piece(problem, block, tokens_together(problem),
                       [&](const Token& first, int64_t tokens) { owner.run(first, tokens, grad_rpb); });
      }
    }
  }

 private:
  static BiasSums sums(const Backward& args, int64_t part) {
    if (!args.grad_rpb_parts) return {nullptr, 0};
    const int64_t size = offsets(args.forward.problem);
    return {args.grad_rpb_parts + part * size, args.parts * size};
  }
};

// One key with its value, in the accumulation type, and the sums of their gradients.
template <class Storage>
class KeyOwner {
 public:
  using Acc = AccumulateType<Storage>;

  KeyOwner(const Backward& args, Arena& arena)
      : args_(args),
        head_dim_(args.forward.problem.head_dim),
        value_dim_(args.forward.problem.value_dim),
        scale_(static_cast<Acc>(args.forward.problem.scale)),
        key_(arena.take<Acc>(head_dim_)),
        value_(arena.take<Acc>(value_dim_)),
        query_row_(arena.take<Acc>(head_dim_)),
        grad_row_(arena.take<Acc>(value_dim_)),
        grads_(head_dim_ + value_dim_, arena),
        weights_(arena.take<Acc>(most_found<Seek::kQueries>(args.forward.problem))) {}

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

  // Room for the weights of the queries.
  Acc* weights() const { return weights_; }

 private:
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
void backward_key_value(const Backward& args, const Token& token, int64_t key_head, KeyOwner<Storage>& owner) {
  using Acc = AccumulateType<Storage>;
  const Forward& forward = args.forward;
  const Problem& problem = forward.problem;
  const int64_t group = group_size(problem), dilation = problem.axes[kAxes - 1].dilation;
  const Neighborhood near = neighborhood<Seek::kQueries>(problem, token);
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
    Arena arena(nullptr);
    KeyOwner<Storage>(args, arena);
    return arena.used();
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    Arena arena(scratch);
    KeyOwner<Storage> owner(args, arena);
    for (int64_t task = begin; task < end; ++task)
      for_each_token_and_key_head(args.forward.problem, task, [&](const Token& token, int64_t key_head) {
        backward_key_value(args, token, key_head, owner);
      });
  }
};

// A few additional keys with their values, in the accumulation type, and the sums of their gradients.
template <class Storage>
class AdditionalOwner {
 public:
  using Acc = AccumulateType<Storage>;

  static constexpr int64_t kMost = 32;

  AdditionalOwner(const Backward& args, Arena& arena)
      : args_(args),
        head_dim_(args.forward.problem.head_dim),
        value_dim_(args.forward.problem.value_dim),
        keys_(arena.take<Acc>(kMost * head_dim_)),
        values_(arena.take<Acc>(kMost * value_dim_)),
        grad_keys_(arena.take<Acc>(kMost * head_dim_)),
        grad_values_(arena.take<Acc>(kMost * value_dim_)),
        query_(arena.take<Acc>(kQueries * head_dim_)),
        grad_output_(arena.take<Acc>(kQueries * value_dim_)),
        weights_(arena.take<Acc>(kQueries * kMost)),
        grad_scores_(arena.take<Acc>(kQueries * kMost)),
        logsumexp_(arena.take<Acc>(kQueries)),
        delta_(arena.take<Acc>(kQueries)),
        transposed_(arena.take<Acc>(kTransposed * larger(head_dim_, value_dim_))) {}

  void start(const AdditionalTokens& tokens) {
    tokens_ = tokens;
    load_columns<Storage>(args_.forward.additional_keys, tokens, head_dim_, keys_, transposed_);
    load_columns<Storage>(args_.forward.additional_values, tokens, value_dim_, values_, transposed_);
    fill_zero(grad_keys_, tokens.count * head_dim_);
    fill_zero(grad_values_, tokens.count * value_dim_);
  }

  void add(const Token& query, int64_t head) {
    load(at<Storage>(args_.forward.query, query, head), query_ + queries_ * head_dim_, head_dim_);
    load(at<Storage>(args_.grad_output, query, head), grad_output_ + queries_ * value_dim_, value_dim_);
    logsumexp_[queries_] = *at<Acc>(args_.forward.logsumexp, query, head);
    delta_[queries_] = *at<Acc>(args_.delta, query, head);
    if (++queries_ == kQueries) flush();
  }

  void finish() {
    flush();
    multiply(static_cast<Acc>(args_.forward.problem.scale), grad_keys_, tokens_.count * head_dim_);
    store_rows<Storage>(args_.grad_additional_keys, tokens_, head_dim_, grad_keys_);
    store_rows<Storage>(args_.grad_additional_values, tokens_, value_dim_, grad_values_);
  }

 private:
  // Queries are collected and done together.
  static constexpr int64_t kQueries = 128;

  void flush() {
    const int64_t count = tokens_.count;
    compute<Acc>({queries_, count, head_dim_, query_, head_dim_, 1, keys_, count, weights_, count, false});
    compute<Acc>(
        {queries_, count, value_dim_, grad_output_, value_dim_, 1, values_, count, grad_scores_, count, false});
    multiply(static_cast<Acc>(args_.forward.problem.scale), weights_, queries_ * count);
    for (int64_t q = 0; q < queries_; ++q) {
      exponentiate(weights_ + q * count, logsumexp_[q], count);
      Acc* grad_scores = grad_scores_ + q * count;
      for (int64_t n = 0; n < count; ++n) grad_scores[n] = weights_[q * count + n] * (grad_scores[n] - delta_[q]);
    }
    compute<Acc>({count, head_dim_, queries_, grad_scores_, 1, count, query_, head_dim_, grad_keys_, head_dim_, true});
    compute<Acc>(
        {count, value_dim_, queries_, weights_, 1, count, grad_output_, value_dim_, grad_values_, value_dim_, true});
    queries_ = 0;
  }

  const Backward& args_;
  const int64_t head_dim_;
  const int64_t value_dim_;
  AdditionalTokens tokens_ = {};
  int64_t queries_ = 0;
  Acc* keys_;    // by channel
  Acc* values_;  // by channel
  Acc* grad_keys_;
  Acc* grad_values_;
  Acc* query_;
  Acc* grad_output_;
  Acc* weights_;
  Acc* grad_scores_;
  Acc* logsumexp_;
  Acc* delta_;
  Acc* transposed_;
};

// Additional keys and values are seen by every query: a task is a few of them, for one key head.
template <class Storage>
struct GradAdditionalPass {
  using Owner = AdditionalOwner<Storage>;

  static int64_t count(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return problem.batch * problem.key_heads * tiles(problem);
  }

  static int64_t work(const Backward& args) {
    const Problem& problem = args.forward.problem;
    return blocks_per_image(problem) * block_tokens(problem) * group_size(problem) *
           smaller(Owner::kMost, problem.additional) * 2 * (problem.head_dim + problem.value_dim);
  }

  static int64_t scratch_bytes(const Backward& args) {
    Arena arena(nullptr);
    Owner(args, arena);
    return arena.used();
  }

  static void run(const Backward& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.forward.problem;
    const int64_t group = group_size(problem), blocks = blocks_per_image(problem);
    Arena arena(scratch);
    Owner owner(args, arena);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tiles(problem) * Owner::kMost;
      const int64_t batch = task / tiles(problem) / problem.key_heads;
      const int64_t key_head = task / tiles(problem) % problem.key_heads;
      owner.start({batch, key_head, first, smaller(Owner::kMost, problem.additional - first)});
      for (int64_t block = batch * blocks; block < (batch + 1) * blocks; ++block)
        for_each_token(problem, block, [&](const Token& query) {
          for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) owner.add(query, head);
        });
      owner.finish();
    }
  }

 private:
  static int64_t tiles(const Problem& problem) { return (problem.additional + Owner::kMost - 1) / Owner::kMost; }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// What a CPU kernel is given: plain pointers, sizes, and strides. Every rank is a grid of three axes, short ones padded
// in front with axes of length 1.
#pragma once

#include <cstdint>

#include "../window.h"

namespace natten2::cpu {

constexpr int kAxes = 3;

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

// A tensor [batch, axis 0, axis 1, axis 2, head, channel] with strides in elements and contiguous channels; additional
// keys and values keep their tokens on axis 2, log-sum-exps have no channels.
struct View {
  void* data;
  int64_t batch;
  int64_t axis[kAxes];
  int64_t head;
};

struct Problem {
  int64_t batch;
  Axis axes[kAxes];
  int64_t heads;
  int64_t key_heads;
  int64_t head_dim;
  int64_t value_dim;
  int64_t additional;  // tokens that every query sees
  double scale;
};

// `rpb` is the contiguous bias [heads, offsets] in the accumulation type, or null.
struct Forward {
  Problem problem;
  View query, key, value, additional_keys, additional_values;
  const void* rpb;
  View output, logsumexp;
};

// The gradient of the log-sum-exp may be null. `delta` [batch, axes, heads] is scratch in the accumulation type, and
// `grad_rpb_parts` [heads, parts, offsets] in double, or null: zeros, to each of which a share of the queries is added.
struct Backward {
  Forward forward;
  View grad_output, grad_logsumexp;
  View grad_query, grad_key, grad_value, grad_additional_keys, grad_additional_values;
  View delta;
  double* grad_rpb_parts;
  int64_t parts;
};

// A kernel for one storage type: `count` independent tasks, of which `run` does those in [begin, end) with
// `scratch_bytes` of its own. No result depends on how the tasks are shared out.
template <class Arguments>
struct Pass {
  int64_t (*count)(const Arguments&);
  int64_t (*work)(const Arguments&);  // multiply-adds per task, roughly
  int64_t (*scratch_bytes)(const Arguments&);
  void (*run)(const Arguments&, int64_t begin, int64_t end, void* scratch);
};

// The backward passes run one after the other.
struct Kernels {
  Pass<Forward> forward;
  const Pass<Backward>* backward;
  int passes;
  int64_t (*parts)(const Problem&);  // of the bias's gradient
};

}  // namespace natten2::cpu

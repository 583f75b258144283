// What the kernels are told: plain pointers, sizes, and strides, without a torch header.
#pragma once

#include <cstdint>

#include "../window.h"

namespace natten2::cuda {

constexpr int kAxes = 3;

// Null, or what went wrong.
using Failure = const char*;

// [batch, *axes, heads, channels], strides in elements and 1 between channels; or [batch, tokens, heads, channels] with
// the tokens along the last axis; or the same without channels.
struct View {
  void* data;
  int64_t batch;
  int64_t axis[kAxes];
  int64_t head;
};

// Absent axes come first and have length 1.
struct Problem {
  BasicAxis<int32_t> axes[kAxes];
  int32_t batch;
  int32_t heads;
  int32_t key_heads;
  int32_t head_dim;
  int32_t value_dim;
  int32_t additional;
  float scale;
  // Half precision: weights go into products as the sum of two numbers. float32: as three products of TF32, not one.
  bool is_exact;
};

struct Forward {
  Problem problem;
  View query;
  View key;
  View value;
  View additional_keys;
  View additional_values;
  const float* bias;  // [heads, offsets], or null
  View output;
  View logsumexp;  // of float32
};

struct Backward {
  Forward forward;
  View grad_output;
  View grad_logsumexp;  // of float32, its data null where there is none
  View delta;           // of float32; written, then read
  View grad_query;
  View grad_key;
  View grad_value;
  float* grad_bias;        // [parts, heads, offsets], or null
  float* grad_additional;  // keys' [parts, batch, additional, key heads, head_dim], then values'; or null
  int32_t bias_parts;
  int32_t additional_parts;
};

}  // namespace natten2::cuda

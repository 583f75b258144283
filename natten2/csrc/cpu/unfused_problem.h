// What the kernels of the unfused pair are given.
#pragma once

#include "problem.h"

namespace natten2::cpu {

// Rows of queries, or of outputs, and of keys or values, with the problem's `head_dim` channels each; scores or weights
// `[batch, axes, heads, slots]` with contiguous slots. Which of them are read and which written is the pass's matter.
struct Unfused {
  Problem problem;
  View queries, keys, additional, scores;
  const void* rpb;         // as in Forward
  double hidden;           // in slots whose key a causal query does not see
  double* grad_rpb_parts;  // as in Backward
  int64_t parts;
};

struct UnfusedKernels {
  Pass<Unfused> score;           // queries, keys, additional, rpb -> scores
  Pass<Unfused> sum;             // scores, keys, additional -> queries
  Pass<Unfused> transposed_sum;  // scores, queries -> keys
  Pass<Unfused> additional_sum;  // scores, queries -> additional
  Pass<Unfused> offset;          // scores -> grad_rpb_parts
  int64_t (*parts)(const Problem&);
};

}  // namespace natten2::cpu

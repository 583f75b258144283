// Walks the keys that a query sees, or the queries that see a key, in runs along the last axis.
#pragma once

#include "problem.h"
#include "scalar.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// The query heads that share a key head are done together: each key and value is loaded once for all of them.
inline int64_t group_size(const Problem& problem) { return problem.heads / problem.key_heads; }

// A token's place in the batch and the grid.
struct Token {
  int64_t batch;
  int64_t index[kAxes];
};

// Tokens of one dilation group that follow each other along the last axis, with the bias entries of their pairs.
struct Run {
  Token first;
  int64_t count;
  int64_t bias;
  int64_t bias_step;
};

enum class Seek { kKeys, kQueries };

// The unit of work: a piece of a line. Blocks are numbered along their line, lines row-major over the batch and the
// grid.
constexpr int64_t kBlock = 64;

inline int64_t blocks_per_line(const Problem& problem) { return (problem.axes[2].length + kBlock - 1) / kBlock; }

inline int64_t blocks_per_image(const Problem& problem) {
  return problem.axes[0].length * problem.axes[1].length * blocks_per_line(problem);
}

inline int64_t block_tokens(const Problem& problem) { return smaller(kBlock, problem.axes[2].length); }

inline Token first_token(const Problem& problem, int64_t block) {
  const int64_t line = block / blocks_per_line(problem);
  const int64_t size0 = problem.axes[0].length, size1 = problem.axes[1].length;
  return {line / size1 / size0, {line / size1 % size0, line % size1, block % blocks_per_line(problem) * kBlock}};
}

inline Token after(Token token, int64_t steps) {
  token.index[2] += steps;
  return token;
}

// Visits a block in pieces of at most so many tokens.
template <class Visit>
inline void for_each_piece(const Problem& problem, int64_t block, int64_t most, Visit&& visit) {
  const Token first = first_token(problem, block);
  const int64_t count = smaller(kBlock, problem.axes[2].length - first.index[2]);
  for (int64_t done = 0; done < count; done += most) visit(after(first, done), smaller(most, count - done));
}

template <class Visit>
inline void for_each_token(const Problem& problem, int64_t block, Visit&& visit) {
  for_each_piece(problem, block, 1, [&](const Token& token, int64_t) { visit(token); });
}

// A task is a block of one key head. The blocks of a key head in an image stand together, since what they read
// overlaps.
template <class Visit>
inline void for_each_token_and_key_head(const Problem& problem, int64_t task, Visit&& visit) {
  const int64_t blocks = blocks_per_image(problem);
  const int64_t batch = task / blocks / problem.key_heads, key_head = task / blocks % problem.key_heads;
  for_each_token(problem, batch * blocks + task % blocks, [&](const Token& token) { visit(token, key_head); });
}

inline int64_t bias_entries(const Axis& axis) { return 2 * axis.kernel_size - 1; }

inline int64_t offsets(const Problem& problem) {
  return bias_entries(problem.axes[0]) * bias_entries(problem.axes[1]) * bias_entries(problem.axes[2]);
}

// At most so many keys see a query, or queries a key.
template <Seek seek>
int64_t most_found(const Problem& problem) {
  int64_t count = 1;
  for (const Axis& axis : problem.axes) {
    // Within a stride of the border, all queries up to the middle of the first whole window share it.
    const int64_t bound = seek == Seek::kKeys ? axis.kernel_size : 2 * axis.kernel_size + axis.stride;
    count *= smaller(bound, group_length(axis, 0));
  }
  return count;
}

// Where a token's neighbors are: positions along each axis, in the token's own dilation group.
struct Neighborhood {
  Token token;
  int64_t group[kAxes];
  int64_t position[kAxes];
  Interval found[kAxes];
};

template <Seek seek>
inline Neighborhood neighborhood(const Problem& problem, const Token& token) {
  Neighborhood result;
  result.token = token;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = problem.axes[a];
    const int64_t position = quotient(token.index[a], axis.dilation);
    const int64_t group = token.index[a] - position * axis.dilation;
    const int64_t length = group_length(axis, group);
    result.group[a] = group;
    result.position[a] = position;
    result.found[a] = seek == Seek::kKeys ? key_bounds(axis, length, position) : query_bounds(axis, length, position);
  }
  return result;
}

template <Seek seek, class Visit>
inline void for_each_run(const Problem& problem, const Neighborhood& near, Visit&& visit) {
  // The bias counts the key's position less the query's.
  constexpr int64_t kSign = seek == Seek::kKeys ? 1 : -1;
  const auto bias_index = [&](int a, int64_t other) {
    return kSign * (other - near.position[a]) + problem.axes[a].kernel_size - 1;
  };
  const auto index = [&](int a, int64_t other) { return other * problem.axes[a].dilation + near.group[a]; };
  const int64_t p2 = near.found[2].begin, count = near.found[2].size();
  for (int64_t p0 = near.found[0].begin; p0 < near.found[0].end; ++p0) {
    for (int64_t p1 = near.found[1].begin; p1 < near.found[1].end; ++p1) {
      const int64_t bias =
          (bias_index(0, p0) * bias_entries(problem.axes[1]) + bias_index(1, p1)) * bias_entries(problem.axes[2]) +
          bias_index(2, p2);
      visit(Run{{near.token.batch, {index(0, p0), index(1, p1), index(2, p2)}}, count, bias, kSign});
    }
  }
}

// The channels of a token and head; a log-sum-exp's single number.
template <class Storage>
inline Storage* at(const View& view, const Token& token, int64_t head) {
  return static_cast<Storage*>(view.data) + token.batch * view.batch + token.index[0] * view.axis[0] +
         token.index[1] * view.axis[1] + token.index[2] * view.axis[2] + head * view.head;
}

// Elements between the tokens of a run.
inline int64_t run_step(const Problem& problem, const View& view) {
  return problem.axes[kAxes - 1].dilation * view.axis[kAxes - 1];
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// The unfused pair and its gradients: the scores of the pairs of a query and a key, and sums of rows under such scores.
//
// Each pass first lists a token's pairs, as offsets of rows and of scores; all arithmetic then runs over lists and
// knows nothing of windows.
#pragma once

#include "arena.h"
#include "lanes.h"
#include "traverse.h"
#include "unfused_problem.h"
#include "vector.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// The slots of a query: those of its window, row-major from its start, then the additional keys.
inline int64_t window_slots(const Problem& problem) {
  return problem.axes[0].kernel_size * problem.axes[1].kernel_size * problem.axes[2].kernel_size;
}

// The pairs of one token, and the row of scores of one query at a time.
template <Seek seek, class Acc>
struct Pairs {
  int64_t count = 0;
  int64_t* row;    // of the partner, in elements after the first token's
  int64_t* score;  // for a key's queries in elements after the first token's, for a query's keys after its own slot 0
  int64_t* bias;
  int64_t* start;  // where each partner's window starts along the last axis
  Acc* factor;
  Acc* total;

  Pairs(const Problem& problem, Arena& arena)
      : row(arena.take<int64_t>(most_found<seek>(problem))),
        score(arena.take<int64_t>(most_found<seek>(problem))),
        bias(arena.take<int64_t>(most_found<seek>(problem))),
        start(arena.take<int64_t>(most_found<seek>(problem))),
        factor(arena.take<Acc>(factors(problem))),
        total(arena.take<Acc>(problem.head_dim)) {}

  // Lists a query's keys, whose rows are `rows`.
  void find_keys(const Unfused& args, const View& rows, const Token& token) {
    const Problem& problem = args.problem;
    const Neighborhood near = neighborhood<Seek::kKeys>(problem, token);
    const Axis* axes = problem.axes;
    const int64_t step = run_step(problem, rows);
    count = 0;
    int64_t run_count = 0;
    const int64_t columns = near.found[1].size();
    for_each_run<Seek::kKeys>(problem, near, [&](const Run& run) {
      const int64_t line = run_count / columns * axes[1].kernel_size + run_count % columns;
      const int64_t first = offset(rows, run.first), slot = line * axes[2].kernel_size;
      for (int64_t j = 0; j < run.count; ++j, ++count) {
        row[count] = first + j * step;
        score[count] = slot + j;
        bias[count] = run.bias + j;
      }
      ++run_count;
    });
  }

  // Lists a key's queries.
  void find_queries(const Unfused& args, const Token& token) {
    const Problem& problem = args.problem;
    const Neighborhood near = neighborhood<Seek::kQueries>(problem, token);
    const Axis* axes = problem.axes;
    // The slot of the key along an axis, for the query at a position.
    const auto slot_along = [&](int a, int64_t position) {
      return near.position[a] - key_bounds(axes[a], group_length(axes[a], near.group[a]), position).begin;
    };
    for (int64_t j = 0; j < near.found[2].size(); ++j) start[j] = slot_along(2, near.found[2].begin + j);
    const int64_t row_step = run_step(problem, args.queries), score_step = run_step(problem, args.scores);
    const int64_t rows = near.found[0].size(), columns = near.found[1].size();
    count = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot0 = slot_along(0, near.found[0].begin + i) * axes[1].kernel_size;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t slot1 = (slot0 + slot_along(1, near.found[1].begin + j)) * axes[2].kernel_size;
        const Token first = {token.batch,
                             {(near.found[0].begin + i) * axes[0].dilation + near.group[0],
                              (near.found[1].begin + j) * axes[1].dilation + near.group[1],
                              near.found[2].begin * axes[2].dilation + near.group[2]}};
        const int64_t first_row = offset(args.queries, first), first_score = offset(args.scores, first) + slot1;
        for (int64_t l = 0; l < near.found[2].size(); ++l, ++count) {
          row[count] = first_row + l * row_step;
          score[count] = first_score + l * score_step + start[l];
        }
      }
    }
  }

 private:
  // For the window's partners, and then for the additional ones; in whole vectors.
  static int64_t factors(const Problem& problem) {
    return round_up(larger(most_found<seek>(problem), problem.additional), kLanes);
  }

  static int64_t offset(const View& view, const Token& token) {
    return token.batch * view.batch + token.index[0] * view.axis[0] + token.index[1] * view.axis[1] +
           token.index[2] * view.axis[2];
  }
};

// products[i] = sum over c of query[c] * rows[row[i] + c]; writes whole vectors, past the end of `products` even.
template <class Storage>
void multiply_rows(const Storage* rows, const int64_t* row, int64_t count, const float* query, int64_t channels,
                   float* products) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes sums[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const Storage* x = rows + row[smaller(i + r, count - 1)];
      Lanes sum = {};
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) sum += load_lanes(query + c) * widen_lanes(x + c);
      if (c < channels) sum += widen_some(query + c, channels - c) * widen_some(x + c, channels - c);
      sums[r] = sum;
    }
    transpose(sums);
    for (int r = 1; r < kLanes; ++r) sums[0] += sums[r];
    store_lanes(sums[0], products + i);
  }
}

inline void multiply_rows(const double* rows, const int64_t* row, int64_t count, const double* query, int64_t channels,
                          double* products) {
  for (int64_t i = 0; i < count; ++i) products[i] = dot(query, rows + row[i], channels);
}

// Adds to `total` the sum over i of factor[i] * rows[row[i] + c], for `kVectors` vectors of channels.
template <int kVectors, class Storage>
inline void add_vectors(const Storage* rows, const int64_t* row, const float* factor, int64_t count, float* total) {
  Lanes sums[kVectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const Storage* x = rows + row[i];
    const Lanes scale = splat(factor[i]);
    for (int v = 0; v < kVectors; ++v) sums[v] += scale * widen_lanes(x + v * kLanes);
  }
  for (int v = 0; v < kVectors; ++v) store_lanes(load_lanes(total + v * kLanes) + sums[v], total + v * kLanes);
}

// Adds to `total` the sum over i of factor[i] * rows[row[i] + c]. Long sums are taken in blocks, as a RowSum's are.
template <class Storage>
void add_rows(const Storage* rows, const int64_t* row, const float* factor, int64_t count, int64_t channels,
              float* total) {
  constexpr int64_t kRows = 128, kTile = 4 * kLanes;
  for (; count > 0; row += kRows, factor += kRows, count -= kRows) {
    const int64_t block = smaller(kRows, count);
    int64_t c = 0;
    for (; c + kTile <= channels; c += kTile) add_vectors<4>(rows + c, row, factor, block, total + c);
    for (; c + 2 * kLanes <= channels; c += 2 * kLanes) add_vectors<2>(rows + c, row, factor, block, total + c);
    for (; c + kLanes <= channels; c += kLanes) add_vectors<1>(rows + c, row, factor, block, total + c);
    if (c == channels) continue;
    Lanes sum = {};
    for (int64_t i = 0; i < block; ++i) sum += splat(factor[i]) * widen_some(rows + row[i] + c, channels - c);
    narrow_some(widen_some(total + c, channels - c) + sum, total + c, channels - c);
  }
}

inline void add_rows(const double* rows, const int64_t* row, const double* factor, int64_t count, int64_t channels,
                     double* total) {
  for (int64_t i = 0; i < count; ++i) add_scaled(factor[i], rows + row[i], total, channels);
}

template <class Storage>
inline const Storage* additional_row(const Unfused& args, int64_t batch, int64_t key_head, int64_t n) {
  return at<Storage>(args.additional, Token{batch, {0, 0, n}}, key_head);
}

// Where the additional keys are, in elements after the first one.
inline void find_additional(const Unfused& args, int64_t* row) {
  for (int64_t n = 0; n < args.problem.additional; ++n) row[n] = n * args.additional.axis[2];
}

template <class Memory>
int64_t count_bytes(const Unfused& args) {
  Arena arena(nullptr);
  Memory(args, arena);
  return arena.used();
}

// A task is a block of one key head.
template <class Storage>
struct BlockPass {
  static int64_t count(const Unfused& args) {
    return args.problem.batch * args.problem.key_heads * blocks_per_image(args.problem);
  }

  template <Seek seek>
  static int64_t work(const Unfused& args) {
    const Problem& problem = args.problem;
    return block_tokens(problem) * (most_found<seek>(problem) + problem.additional) * group_size(problem) *
           problem.head_dim;
  }
};

// Writes scores: the products of queries with the keys that they see.
template <class Storage>
struct ScorePass : BlockPass<Storage> {
  using Acc = AccumulateType<Storage>;

  static int64_t work(const Unfused& args) { return BlockPass<Storage>::template work<Seek::kKeys>(args); }

  struct Memory {
    int64_t* additional;
    Pairs<Seek::kKeys, Acc> pairs;
    Acc* query;
    Acc* scores;

    Memory(const Unfused& args, Arena& arena)
        : additional(arena.take<int64_t>(args.problem.additional)),
          pairs(args.problem, arena),
          query(arena.take<Acc>(args.problem.head_dim)),
          scores(arena.take<Acc>(window_slots(args.problem) + args.problem.additional)) {}
  };

  static int64_t scratch_bytes(const Unfused& args) { return count_bytes<Memory>(args); }

  static void run(const Unfused& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.problem;
    const int64_t group = group_size(problem), channels = problem.head_dim, window = window_slots(problem);
    Arena arena(scratch);
    Memory memory(args, arena);
    auto& [additional, pairs, query, scores] = memory;
    find_additional(args, additional);
    const Acc scale = static_cast<Acc>(problem.scale), hidden = static_cast<Acc>(args.hidden);
    const auto visit = [&](const Token& token, int64_t key_head) {
      pairs.find_keys(args, args.keys, token);
      const Storage* keys = static_cast<const Storage*>(args.keys.data) + key_head * args.keys.head;
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        if (pairs.count < window)
          for (int64_t i = 0; i < window; ++i) scores[i] = hidden;
        load(at<Storage>(args.queries, token, head), query, channels);
        multiply_rows(keys, pairs.row, pairs.count, query, channels, pairs.factor);
        const Acc* rpb = args.rpb ? static_cast<const Acc*>(args.rpb) + head * offsets(problem) : nullptr;
        for (int64_t i = 0; i < pairs.count; ++i)
          scores[pairs.score[i]] = scale * pairs.factor[i] + (rpb ? rpb[pairs.bias[i]] : 0);
        if (problem.additional > 0) {
          multiply_rows(additional_row<Storage>(args, token.batch, key_head, 0), additional, problem.additional, query,
                        channels, pairs.factor);
          for (int64_t n = 0; n < problem.additional; ++n) scores[window + n] = scale * pairs.factor[n];
        }
        store(scores, at<Storage>(args.scores, token, head), window + problem.additional);
      }
    };
    for (int64_t task = begin; task < end; ++task) for_each_token_and_key_head(problem, task, visit);
  }
};

// Writes one row for each query: the sum of the keys that it sees under its scores, scaled.
template <class Storage>
struct SumPass : BlockPass<Storage> {
  using Acc = AccumulateType<Storage>;

  static int64_t work(const Unfused& args) { return BlockPass<Storage>::template work<Seek::kKeys>(args); }

  struct Memory {
    int64_t* additional;
    Pairs<Seek::kKeys, Acc> pairs;

    Memory(const Unfused& args, Arena& arena)
        : additional(arena.take<int64_t>(args.problem.additional)), pairs(args.problem, arena) {}
  };

  static int64_t scratch_bytes(const Unfused& args) { return count_bytes<Memory>(args); }

  static void run(const Unfused& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.problem;
    const int64_t group = group_size(problem), channels = problem.head_dim, window = window_slots(problem);
    Arena arena(scratch);
    Memory memory(args, arena);
    auto& [additional, pairs] = memory;
    find_additional(args, additional);
    const auto visit = [&](const Token& token, int64_t key_head) {
      pairs.find_keys(args, args.keys, token);
      const Storage* keys = static_cast<const Storage*>(args.keys.data) + key_head * args.keys.head;
      for (int64_t g = 0; g < group; ++g) {
        const int64_t head = key_head * group + g;
        const Storage* scores = at<Storage>(args.scores, token, head);
        fill_zero(pairs.total, channels);
        for (int64_t i = 0; i < pairs.count; ++i) pairs.factor[i] = widen(scores[pairs.score[i]]);
        add_rows(keys, pairs.row, pairs.factor, pairs.count, channels, pairs.total);
        if (problem.additional > 0) {
          load(scores + window, pairs.factor, problem.additional);
          add_rows(additional_row<Storage>(args, token.batch, key_head, 0), additional, pairs.factor,
                   problem.additional, channels, pairs.total);
        }
        multiply(static_cast<Acc>(problem.scale), pairs.total, channels);
        store(pairs.total, at<Storage>(args.queries, token, head), channels);
      }
    };
    for (int64_t task = begin; task < end; ++task) for_each_token_and_key_head(problem, task, visit);
  }
};

// The transpose: writes one row for each key, the sum of the queries that see it.
template <class Storage>
struct TransposedSumPass : BlockPass<Storage> {
  using Acc = AccumulateType<Storage>;

  static int64_t work(const Unfused& args) { return BlockPass<Storage>::template work<Seek::kQueries>(args); }

  struct Memory {
    Pairs<Seek::kQueries, Acc> pairs;

    Memory(const Unfused& args, Arena& arena) : pairs(args.problem, arena) {}
  };

  static int64_t scratch_bytes(const Unfused& args) { return count_bytes<Memory>(args); }

  static void run(const Unfused& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.problem;
    const int64_t group = group_size(problem), channels = problem.head_dim;
    Arena arena(scratch);
    Memory memory(args, arena);
    auto& pairs = memory.pairs;
    const auto visit = [&](const Token& token, int64_t key_head) {
      pairs.find_queries(args, token);
      fill_zero(pairs.total, channels);
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        const Storage* scores = static_cast<const Storage*>(args.scores.data) + head * args.scores.head;
        const Storage* queries = static_cast<const Storage*>(args.queries.data) + head * args.queries.head;
        for (int64_t i = 0; i < pairs.count; ++i) pairs.factor[i] = widen(scores[pairs.score[i]]);
        add_rows(queries, pairs.row, pairs.factor, pairs.count, channels, pairs.total);
      }
      multiply(static_cast<Acc>(problem.scale), pairs.total, channels);
      store(pairs.total, at<Storage>(args.keys, token, key_head), channels);
    };
    for (int64_t task = begin; task < end; ++task) for_each_token_and_key_head(problem, task, visit);
  }
};

// The same for additional keys, which every query sees. A task is one of them, of one key head.
template <class Storage>
struct AdditionalSumPass {
  using Acc = AccumulateType<Storage>;

  static int64_t count(const Unfused& args) {
    return args.problem.batch * args.problem.key_heads * args.problem.additional;
  }

  static int64_t work(const Unfused& args) {
    const Problem& problem = args.problem;
    return blocks_per_image(problem) * block_tokens(problem) * group_size(problem) * problem.head_dim;
  }

  struct Memory {
    int64_t* row;
    Acc* factor;
    Acc* total;

    Memory(const Unfused& args, Arena& arena)
        : row(arena.take<int64_t>(kBlock)),
          factor(arena.take<Acc>(kBlock)),
          total(arena.take<Acc>(args.problem.head_dim)) {}
  };

  static int64_t scratch_bytes(const Unfused& args) { return count_bytes<Memory>(args); }

  static void run(const Unfused& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.problem;
    const int64_t group = group_size(problem), channels = problem.head_dim, window = window_slots(problem);
    Arena arena(scratch);
    Memory memory(args, arena);
    auto& [row, factor, total] = memory;
    for (int64_t i = 0; i < kBlock; ++i) row[i] = i * args.queries.axis[2];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task % problem.additional, key_head = task / problem.additional % problem.key_heads;
      const int64_t batch = task / problem.additional / problem.key_heads, blocks = blocks_per_image(problem);
      fill_zero(total, channels);
      for (int64_t block = batch * blocks; block < (batch + 1) * blocks; ++block)
        for_each_piece(problem, block, kBlock, [&](const Token& first, int64_t tokens) {
          for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
            const Storage* scores = at<Storage>(args.scores, first, head) + window + n;
            for (int64_t i = 0; i < tokens; ++i) factor[i] = widen(scores[i * args.scores.axis[2]]);
            add_rows(at<Storage>(args.queries, first, head), row, factor, tokens, channels, total);
          }
        });
      multiply(static_cast<Acc>(problem.scale), total, channels);
      store(total, const_cast<Storage*>(additional_row<Storage>(args, batch, key_head, n)), channels);
    }
  }
};

// Sums scores by offset, into the gradient of a bias. A task is a share of all blocks, for one head: the part that it
// is summed in.
template <class Storage>
struct OffsetPass {
  using Acc = AccumulateType<Storage>;

  // Enough for many threads, few enough to fit in memory, and the same for any number of threads.
  static int64_t parts(const Problem& problem) {
    constexpr int64_t kTasks = 256, kMostEntries = int64_t{1} << 22;
    const int64_t wanted = (kTasks + problem.heads - 1) / problem.heads;
    return larger(1, smaller(wanted, kMostEntries / (problem.heads * offsets(problem))));
  }

  static int64_t count(const Unfused& args) { return args.problem.heads * args.parts; }

  static int64_t work(const Unfused& args) {
    const Problem& problem = args.problem;
    const int64_t blocks = problem.batch * blocks_per_image(problem) / args.parts + 1;
    return blocks * block_tokens(problem) * most_found<Seek::kKeys>(problem);
  }

  struct Memory {
    Pairs<Seek::kKeys, Acc> pairs;

    Memory(const Unfused& args, Arena& arena) : pairs(args.problem, arena) {}
  };

  static int64_t scratch_bytes(const Unfused& args) { return count_bytes<Memory>(args); }

  static void run(const Unfused& args, int64_t begin, int64_t end, void* scratch) {
    const Problem& problem = args.problem;
    const int64_t blocks = problem.batch * blocks_per_image(problem);
    Arena arena(scratch);
    Memory memory(args, arena);
    auto& pairs = memory.pairs;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / args.parts, part = task % args.parts;
      double* sums = args.grad_rpb_parts + task * offsets(problem);
      for (int64_t block = blocks * part / args.parts; block < blocks * (part + 1) / args.parts; ++block)
        for_each_token(problem, block, [&](const Token& token) {
          pairs.find_keys(args, args.keys, token);
          const Storage* scores = at<Storage>(args.scores, token, head);
          for (int64_t i = 0; i < pairs.count; ++i) sums[pairs.bias[i]] += widen(scores[pairs.score[i]]);
        });
    }
  }
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

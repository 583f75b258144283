// What both directions of the stencil share: a sheet's key rows, the scores of a tile of query rows, and sums over
// keys.
#pragma once

#include "stencil_plan.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Writes tokens by channel, `pitch` apart; behind the last one stand copies of it, up to a whole vector.
template <class Storage>
inline void load_by_channel(const Storage* base, const int64_t* offsets, int64_t count, int64_t channels, float* out,
                            int64_t pitch) {
  for (int64_t first = 0; first < count; first += kLanes, out += kLanes) {
    const Storage* tokens[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) tokens[i] = base + offsets[smaller(first + i, count - 1)];
    int64_t channel = 0;
    for (; channel + kLanes <= channels; channel += kLanes) {
      Lanes rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = widen_lanes(tokens[i] + channel);
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store_lanes(rows[i], out + (channel + i) * pitch);
    }
    if (channel == channels) continue;
    Lanes rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = widen_some(tokens[i] + channel, channels - channel);
    transpose(rows);
    for (int64_t i = 0; i < channels - channel; ++i) store_lanes(rows[i], out + (channel + i) * pitch);
  }
}

// Writes tokens as rows of whole vectors.
template <class Storage>
inline void load_by_token(const Storage* base, const int64_t* offsets, int64_t count, int64_t channels, float* out) {
  for (int64_t t = 0; t < count; ++t) {
    const Storage* token = base + offsets[t];
    int64_t channel = 0;
    for (; channel + 2 * kLanes <= channels; channel += 2 * kLanes, out += 2 * kLanes) {
      const Lanes first = widen_lanes(token + channel), second = widen_lanes(token + channel + kLanes);
      store_lanes(first, out);
      store_lanes(second, out + kLanes);
    }
    for (; channel < channels; channel += kLanes, out += kLanes)
      store_lanes(widen_some(token + channel, channels - channel), out);
  }
}

// A problem's sizes that the inner loops want.
struct Sizes {
  int64_t heads_per_key, key_vectors, value_vectors;
  int64_t row_scores;     // floats, of one block and key row
  int64_t window_scores;  // and of a whole window
  int64_t pitch;          // between the channels of a key row
  int64_t sources;        // key rows of a tile
  int64_t bias_rows, block_bias;

  Sizes(const Problem& problem, const Cut& cut)
      : heads_per_key(group_size(problem)),
        key_vectors((problem.head_dim + kLanes - 1) / kLanes),
        value_vectors((problem.value_dim + kLanes - 1) / kLanes),
        row_scores(problem.axes[2].kernel_size * kLanes),
        window_scores(problem.axes[0].kernel_size * problem.axes[1].kernel_size * row_scores),
        // An odd number of vectors spreads the channels over the sets of a cache.
        pitch((((cut.most_keys + kLanes - 1) / kLanes + 2) | 1) * kLanes),
        sources(cut.row_slots[0] * cut.row_slots[1]),
        bias_rows(bias_entries(problem.axes[1])),
        block_bias(bias_entries(problem.axes[0]) * bias_rows * row_scores) {}
};

inline int64_t most_blocks(const Cut& cut) { return (cut.most_queries + kLanes - 1) / kLanes; }

// The part of a stencil that doesn't know what its rows hold.
class SheetWalk {
 public:
  SheetWalk(const Forward& args, const Cut& cut, Arena& arena)
      : args(args),
        problem(args.problem),
        sizes(args.problem, cut),
        columns(args.problem, cut, arena),
        slots(cut.row_slots[0], cut.row_slots[1], arena),
        key_rows(arena.take<KeyRow>(sizes.sources)),
        bias_(args.rpb ? arena.take<float>(sizes.heads_per_key * most_blocks(cut) * sizes.block_bias) : nullptr) {}

  // Returns whether the columns have changed.
  bool start(const Sheet& next) {
    sheet = next;
    slots.clear();
    if (!columns.start(next.chunk, next.tile)) return false;
    if (args.rpb) expand_bias();
    return true;
  }

  int64_t depth() const { return group_length(problem.axes[0], sheet.group0); }
  int64_t height() const { return group_length(problem.axes[1], sheet.group1); }

  // Where a row of the sheet begins in a tensor; `head` counts from the first of those that share keys.
  int64_t row_offset(const View& view, int64_t p0, int64_t p1, int64_t head = 0) const {
    return sheet.batch * view.batch + (sheet.group0 + p0 * problem.axes[0].dilation) * view.axis[0] +
           (sheet.group1 + p1 * problem.axes[1].dilation) * view.axis[1] + head * view.head;
  }

  // A key row that a tile sees, the query rows [begin, end) that see it, and where their scores with it stand.
  struct KeyRow {
    int64_t p0, p1, slot;
    int begin, end;
    int32_t scores[kRows];
  };

  // Finds the key rows of a tile, and has those loaded that aren't there yet.
  template <class Load>
  void find_key_rows(const RowTile& tile, Load&& load) {
    key_row_count = 0;
    for (int64_t p0 = tile.keys0.begin; p0 < tile.keys0.end; ++p0) {
      for (int64_t p1 = tile.all_keys1.begin; p1 < tile.all_keys1.end; ++p1) {
        KeyRow row = {p0, p1, slots.slot(p0, p1), kRows, 0, {}};
        for (int r = 0; r < tile.count; ++r) {
          if (p1 < tile.keys1[r].begin || tile.keys1[r].end <= p1) continue;
          row.begin = r < row.begin ? r : row.begin;
          row.end = r + 1;
          const int64_t line = (p0 - tile.keys0.begin) * problem.axes[1].kernel_size + p1 - tile.keys1[r].begin;
          row.scores[r] = static_cast<int32_t>(r * sizes.window_scores + line * sizes.row_scores);
        }
        if (row.end == 0) continue;
        const int64_t number = p0 * height() + p1;
        if (slots.held(row.slot) != number) {
          slots.held(row.slot) = number;
          load(row);
        }
        key_rows[key_row_count++] = row;
      }
    }
  }

  // The entries of the bias for a block's query row and a key row, by slot and lane.
  int64_t bias_offset(const RowTile& tile, int r, const KeyRow& row, int64_t block) const {
    const int64_t row0 = row.p0 - tile.p0 + problem.axes[0].kernel_size - 1;
    const int64_t row1 = row.p1 - tile.p1[r] + problem.axes[1].kernel_size - 1;
    return (tile.head[r] * columns.blocks() + block) * sizes.block_bias +
           (row0 * sizes.bias_rows + row1) * sizes.row_scores;
  }

  // Writes the scaled and biased scores of a block. `keys` holds the rows of all slots by channel.
  void score_block(const RowTile& tile, int64_t b, const float* keys, const float* queries, int64_t channels,
                   bool is_biased, float scale, float* out) const {
    const Block& block = columns.block_at(b);
    Scores scores;
    scores.pitch = sizes.pitch;
    scores.index = block.index;
    scores.query_row = channels * kLanes;
    scores.channels = channels;
    scores.scale = scale;
    for (int64_t s = 0; s < key_row_count; ++s) {
      const KeyRow& row = key_rows[s];
      scores.keys = keys + row.slot * channels * sizes.pitch + block.key;
      scores.next = s + 1 < key_row_count ? (key_rows[s + 1].slot - row.slot) * channels * sizes.pitch : 0;
      scores.queries = queries + row.begin * channels * kLanes;
      for (int r = row.begin; r < row.end; ++r) {
        scores.bias[r - row.begin] = is_biased ? bias_ + bias_offset(tile, r, row, b) : nullptr;
        scores.out[r - row.begin] = out + row.scores[r];
      }
      score_rows(block.fetch, scores, row.end - row.begin, problem.axes[2].kernel_size, block.most_keys);
    }
  }

  // Idle lanes read behind the last column: numbers that are quick to compute with, at least.
  void clear_padding(float* keys, int64_t channels) const {
    const int64_t begin = columns.keys() / kLanes * kLanes;
    for (int64_t row = 0; row < slots.size() * channels; ++row)
      fill_zero(keys + row * sizes.pitch + begin, sizes.pitch - begin);
  }

  // Visits the scores of a query row in pieces without gaps: `act(first, vectors)`.
  template <class Act>
  void for_each_piece(const RowTile& tile, int r, Act&& act) const {
    const int64_t rows = problem.axes[1].kernel_size, keys = problem.axes[2].kernel_size;
    const bool is_whole = tile.keys1[r].size() == rows;
    const int64_t pieces = is_whole ? 1 : tile.keys0.size();
    const int64_t vectors = is_whole ? tile.keys0.size() * rows * keys : tile.keys1[r].size() * keys;
    for (int64_t p = 0; p < pieces; ++p) act(r * sizes.window_scores + p * rows * sizes.row_scores, vectors);
  }

  // Sets the scores of keys to `hidden` that causal queries don't see.
  void hide(const RowTile& tile, int64_t b, float hidden, float* scores) const {
    const int64_t keys = problem.axes[2].kernel_size;
    const Block& block = columns.block_at(b);
    LaneInts size = {};
    bool is_full = true;
    for (int64_t i = 0; i < block.count; ++i) {
      size[i] = columns.sizes()[block.first + i];
      is_full = is_full && size[i] == keys;
    }
    if (is_full) return;
    for (int r = 0; r < tile.count; ++r)
      for_each_piece(tile, r, [&](int64_t first, int64_t vectors) {
        for (int64_t i = 0; i < vectors; ++i) {
          float* score = scores + first + i * kLanes;
          store_lanes(size > static_cast<int32_t>(i % keys) ? load_lanes(score) : splat(hidden), score);
        }
      });
  }

  const Forward& args;
  const Problem& problem;
  const Sizes sizes;
  Sheet sheet = {};
  Columns columns;
  RowSlots slots;
  KeyRow* key_rows;
  int64_t key_row_count = 0;

 private:
  // Writes the bias of each block for all distances of rows, by slot and lane.
  void expand_bias() {
    const int64_t keys = problem.axes[2].kernel_size, entries = bias_entries(problem.axes[2]);
    float* out = bias_;
    for (int64_t head = 0; head < sizes.heads_per_key; ++head) {
      for (int64_t b = 0; b < columns.blocks(); ++b) {
        const Block& block = columns.block_at(b);
        const float* rpb[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          rpb[i] = static_cast<const float*>(args.rpb) + head * offsets(problem) +
                   columns.bias()[block.first + smaller(i, block.count - 1)];
        for (int64_t row = 0; row < bias_entries(problem.axes[0]) * sizes.bias_rows; ++row)
          for (int64_t k = 0; k < keys; ++k, out += kLanes)
            for (int64_t i = 0; i < kLanes; ++i) out[i] = rpb[i][row * entries + k];
      }
    }
  }

  float* bias_;
};

// Visits neighboring columns, and vectors of channels, so that enough sums run side by side, but not more than fit in
// registers: `act(columns, width, column, vector, span)`, the first two as types. Columns without tokens are left out.
template <class TokensOf, class Act>
inline void for_each_sum(int64_t count, int64_t vectors, TokensOf&& tokens_of, Act&& act) {
  constexpr std::integral_constant<int, 1> kOne;
  const auto run = [&](auto most, auto width, int64_t vector) {
    for (int64_t column = 0; column < count; ++column) {
      const Interval tokens = tokens_of(column);
      if (tokens.size() <= 0) continue;
      if constexpr (most() == 2) {
        const Interval next = column + 1 < count ? tokens_of(column + 1) : Interval{};
        if (next.size() > 0) {
          act(most, width, column, vector, span(tokens, next));
          ++column;
          continue;
        }
      }
      act(kOne, width, column, vector, span(tokens));
    }
  };
  int64_t vector = 0;
  for (; vector + kVectors <= vectors; vector += kVectors) run(kOne, std::integral_constant<int, kVectors>(), vector);
  if constexpr (kVectors == 4)
    for (; vector + 2 <= vectors; vector += 2)
      run(std::integral_constant<int, 2>(), std::integral_constant<int, 2>(), vector);
  for (; vector < vectors; ++vector) run(std::integral_constant<int, 2>(), std::integral_constant<int, 1>(), vector);
}

// Sums tokens for the query columns of a block: `weights` holds a row of lanes for each token of a window. `row(r,
// column)` is where the sums of a column go, in whole vectors if `Storage` is float, or null.
template <class Storage, class RowOf>
inline void sum_queries(const Columns& columns, const Block& block, const Source* sources, int64_t source_count,
                        const float* weights, int64_t channels, float scale, RowOf&& row_of) {
  const int32_t* sizes = columns.sizes() + block.first;
  const int32_t* starts = columns.starts() + block.first;
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  for_each_sum(
      block.count, vectors, [&](int64_t column) { return Interval{starts[column], starts[column] + sizes[column]}; },
      [&](auto columns, auto width, int64_t column, int64_t vector, const Span& span) NATTEN2_INLINE {
        const int64_t channel = vector * kLanes, count = channels - channel;
        ColumnSums sums = {sources, source_count, vectors * kLanes, channel, span, {}};
        Storage* out[columns()][kRows];
        const bool is_direct = std::is_same_v<Storage, float> && count >= width() * kLanes;
        float some[columns()][kRows][width() * kLanes];
        for (int c = 0; c < columns(); ++c)
          for (int r = 0; r < kRows; ++r) {
            out[c][r] = row_of(r, column + c);
            if (!out[c][r]) continue;
            out[c][r] += channel;
            sums.out[c][r] = is_direct ? reinterpret_cast<float*>(out[c][r]) : some[c][r];
          }
        sum_query_columns<columns(), width()>(sums, weights + column - starts[column] * kLanes,
                                              columns() == 2 ? starts[column + 1] - starts[column] : 0, scale);
        if (is_direct) return;
        for (int c = 0; c < columns(); ++c)
          for (int r = 0; r < kRows; ++r)
            for (int i = 0; i < width() && out[c][r]; ++i)
              narrow_some(load_lanes(some[c][r] + i * kLanes), out[c][r] + i * kLanes, count - i * kLanes);
      });
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

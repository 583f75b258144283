// What both directions of the stencil share: a sheet's key rows, and the scores of a tile of query rows.
#pragma once

#include "stencil_load.h"
#include "stencil_plan.h"
#include "stencil_sum.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

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
        pitch(key_pitch(problem, cut)),
        sources(cut.row_slots[0] * cut.row_slots[1]),
        bias_rows(bias_entries(problem.axes[1])),
        block_bias(bias_entries(problem.axes[0]) * bias_rows * row_scores) {}

  // With room for what two vectors of permuted keys reach behind the last key, which a wide window begins nearer to. An
  // odd number of vectors spreads the channels over the sets of a cache.
  static int64_t key_pitch(const Problem& problem, const Cut& cut) {
    const int64_t vectors = (cut.most_keys + kLanes - 1) / kLanes;
    return ((vectors + (problem.axes[2].kernel_size > kLanes ? 2 : 1)) | 1) * kLanes;
  }
};

inline int64_t most_blocks(const Cut& cut) { return (cut.most_queries + kLanes - 1) / kLanes; }

// Where the tokens of each block's columns are, line by line of memory: as many lines as there are channels.
class Lines {
 public:
  Lines(int64_t blocks, int64_t channels, Arena& arena)
      : blocks_(blocks), channels_(channels), lines_(arena.take<int64_t>(blocks * channels)) {}

  // `offsets` are those of `columns` tokens, in elements.
  template <class Storage>
  void start(const int64_t* offsets, int64_t columns, int64_t token_channels) {
    constexpr int64_t kLine = 64;
    if (columns == 0) return;
    const int64_t bytes = token_channels * static_cast<int64_t>(sizeof(Storage));
    for (int64_t b = 0; b < blocks_; ++b) {
      int64_t column = b * kLanes, byte = 0;
      for (int64_t i = 0; i < channels_; ++i) {
        const int64_t offset = offsets[smaller(column, columns - 1)];
        lines_[b * channels_ + i] = offset * static_cast<int64_t>(sizeof(Storage)) + byte;
        byte += kLine;
        if (byte < bytes) continue;
        byte = 0;
        ++column;
      }
    }
  }

  const int64_t* block(int64_t b) const { return lines_ + b * channels_; }

 private:
  int64_t blocks_, channels_;
  int64_t* lines_;
};

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

  // What the block after `b` reads of query row r: in this tile, or the next one.
  template <class Storage>
  Ahead queries_ahead(const View& view, const Lines& lines, const RowTile& tile, int64_t b, int r) const {
    if (r >= tile.count) return {};
    if (b + 1 < columns.blocks()) return ahead<Storage>(view, tile.p0, tile.p1[r], tile.head[r], lines.block(b + 1));
    const int64_t row = tile.p1[r] * sizes.heads_per_key + tile.head[r] + kRows;
    const int64_t p1 = row / sizes.heads_per_key;
    return p1 < height() ? ahead<Storage>(view, tile.p0, p1, row % sizes.heads_per_key, lines.block(0)) : Ahead{};
  }

  // What the next tile reads, under block `b`, of number `n` of the key rows that it is the first to see: kRows of each
  // plane.
  template <class Storage>
  Ahead keys_ahead(const View& view, const Lines& lines, const RowTile& tile, int64_t b, int64_t n) const {
    const int64_t p0 = tile.keys0.begin + n / kRows, p1 = tile.all_keys1.end + n % kRows;
    return p0 < tile.keys0.end && p1 < height() ? ahead<Storage>(view, p0, p1, 0, lines.block(b)) : Ahead{};
  }

  // Writes the scaled and biased scores of a block. `keys` holds the rows of all slots by channel, or by pair.
  // Meanwhile, what `ahead(s)` wants is fetched for each of these rows, s counting from 0.
  template <bool kPairs, class AheadOf>
  void score_block(const RowTile& tile, int64_t b, const float* keys, const float* queries, int64_t channels,
                   bool is_biased, float scale, float* out, AheadOf&& ahead) const {
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
      scores.queries = queries + row.begin * channels * kLanes;
      scores.ahead = ahead(s);
      for (int r = row.begin; r < row.end; ++r) {
        scores.bias[r - row.begin] = is_biased ? bias_ + bias_offset(tile, r, row, b) : nullptr;
        scores.out[r - row.begin] = out + row.scores[r];
      }
      score_rows<kPairs>(block.fetch, scores, row.end - row.begin, problem.axes[2].kernel_size, block.most_keys);
    }
  }

  // Whether there is a single row of queries, with windows so wide that blocks that follow each other share most keys.
  bool is_wide() const {
    return sizes.heads_per_key == 1 && problem.axes[0].length == 1 && problem.axes[1].length == 1 &&
           problem.axes[2].kernel_size >= kRows * kLanes;
  }

  // A tile of one row, as often as there are rows: each is a block of its own.
  RowTile repeated(const RowTile& tile) const {
    RowTile rows = tile;
    for (int r = 1; r < kRows; ++r) {
      rows.p1[r] = tile.p1[0];
      rows.head[r] = tile.head[0];
      rows.keys1[r] = tile.keys1[0];
    }
    return rows;
  }

  // Blocks from `b` on, at most kRows, whose windows slide over the same keys.
  int blocks_together(int64_t b) const {
    const Block& first = columns.block_at(b);
    int count = 1;
    for (; count < kRows && b + count < columns.blocks(); ++count) {
      const Block& block = columns.block_at(b + count);
      if (first.fetch != kConsecutive || block.fetch != kConsecutive || block.key != first.key + count * kLanes) break;
    }
    return count;
  }

  // Scores `count` such blocks: their queries, and scores, are the rows of a tile.
  template <bool kPairs>
  void score_blocks(const RowTile& tile, int64_t b, int count, const float* keys, const float* queries,
                    int64_t channels, bool is_biased, float scale, float* out) const {
    if (count == 1)
      return score_block<kPairs>(tile, b, keys, queries, channels, is_biased, scale, out,
                                 [](int64_t) { return Ahead{}; });
    const int64_t window = problem.axes[2].kernel_size;
    const KeyRow& row = key_rows[0];
    Scores scores;
    scores.pitch = sizes.pitch;
    scores.ahead = {};
    scores.query_row = channels * kLanes;
    scores.channels = channels;
    scores.scale = scale;
    // Key k of the first block is key k - kLanes of the next; so the blocks that see a key are those of a range.
    for (int64_t key = 0, end = 0; key < window + (count - 1) * kLanes; key = end) {
      const int first_row = key < window ? 0 : static_cast<int>((key - window) / kLanes + 1);
      const int last_row = static_cast<int>(smaller(count - 1, key / kLanes));
      end = smaller(window + first_row * kLanes, last_row + 1 < count ? (last_row + 1) * kLanes : INT64_MAX);
      scores.keys = keys + row.slot * channels * sizes.pitch + columns.block_at(b).key + key;
      scores.queries = queries + first_row * channels * kLanes;
      for (int r = first_row; r <= last_row; ++r) {
        const int64_t first = (key - r * kLanes) * kLanes;
        scores.bias[r - first_row] = is_biased ? bias_ + bias_offset(tile, 0, row, b + r) + first : nullptr;
        scores.out[r - first_row] = out + r * sizes.window_scores + first;
      }
      score_rows<kPairs>(kConsecutive, scores, last_row - first_row + 1, end - key, kLanes);
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

  // Sets the scores of a query row's keys to `hidden` that causal queries don't see.
  void hide(const RowTile& tile, int r, const Block& block, float hidden, float* scores) const {
    if (block.is_full) return;
    const int64_t keys = problem.axes[2].kernel_size;
    LaneInts size = {};
    for (int64_t i = 0; i < block.count; ++i) size[i] = columns.sizes()[block.first + i];
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
  template <class Storage>
  Ahead ahead(const View& view, int64_t p0, int64_t p1, int64_t head, const int64_t* lines) const {
    return {reinterpret_cast<const char*>(static_cast<const Storage*>(view.data) + row_offset(view, p0, p1, head)),
            lines};
  }

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

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// Backward's gradients of keys and values. Weights of a few tiles of query rows are kept until what they give to each
// key is summed: so that a key's sums are rarely loaded and stored.
#pragma once

#include <algorithm>
#include <cmath>

#include "stencil.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Where a row of a block's queries is kept by token, and the gradients of their outputs.
struct QueryTokens {
  float* queries;
  float* grad_outputs;
};

template <class Storage>
class KeyGradients {
 public:
  KeyGradients(const Backward& args, const SheetWalk& walk, const Cut& cut, Arena& arena)
      : args_(args),
        problem_(args.forward.problem),
        cut_(cut),
        walk_(walk),
        sizes_(walk.sizes),
        scale_(static_cast<float>(problem_.scale)),
        is_key_direct_(is_direct(problem_.head_dim) && std::fabs(scale_) <= 1),
        is_value_direct_(is_direct(problem_.value_dim)),
        key_channels_(sizes_.key_vectors * kLanes),
        value_channels_(sizes_.value_vectors * kLanes),
        together_(together(walk, cut)),
        tiles_(tiles(walk, cut)),
        row_columns_(walk.is_wide() ? kLanes : together_ * kLanes),
        block_scores_(kRows * sizes_.window_scores),
        tile_scores_(together_ * block_scores_),
        sums_(cut.row_slots[0], problem_.axes[0].length > 1 ? cut.rows : cut.row_slots[1] + (tiles_ - 1) * kRows,
              arena),
        grad_key_offsets_(arena.take<int64_t>(cut.most_keys)),
        grad_value_offsets_(arena.take<int64_t>(cut.most_keys)),
        key_sum_offsets_(arena.take<int64_t>(cut.most_keys)),
        value_sum_offsets_(arena.take<int64_t>(cut.most_keys)),
        owned_keys_(arena.take<int32_t>(cut.most_keys)),
        seen_begin_(arena.take<int32_t>(cut.most_keys)),
        seen_end_(arena.take<int32_t>(cut.most_keys)),
        weight_offsets_(arena.take<int32_t>(larger(kRows, together_) * kLanes)),
        kept_rows_(arena.take<SheetWalk::KeyRow>(tiles_ * sizes_.sources)),
        owned_rows_(arena.take<OwnedRow>(tiles_ * sizes_.sources)),
        grad_keys_(arena.take<float>(is_key_direct_ ? 0 : sums_.size() * cut.most_keys * key_channels_)),
        grad_values_(arena.take<float>(is_value_direct_ ? 0 : sums_.size() * cut.most_keys * value_channels_)),
        queries_(arena.take<float>(tiles_ * kRows * row_columns_ * key_channels_)),
        grad_outputs_(arena.take<float>(tiles_ * kRows * row_columns_ * value_channels_)),
        weights_(arena.take<float>(tiles_ * tile_scores_)),
        grad_scores_(arena.take<float>(tiles_ * tile_scores_)) {}

  // After the columns have changed.
  void start_columns() {
    const Columns& columns = walk_.columns;
    columns.key_offsets(args_.grad_key, grad_key_offsets_);
    columns.key_offsets(args_.grad_value, grad_value_offsets_);
    for (int64_t l = 0; l < columns.line_count(); ++l) {
      const Line& line = columns.line(l);
      for (int64_t p = line.keys.begin; p < line.keys.end; ++p)
        owned_keys_[line.key_column + p - line.keys.begin] = line.owned.begin <= p && p < line.owned.end;
    }
    for (int64_t key = 0; key < columns.keys(); ++key) {
      key_sum_offsets_[key] = is_key_direct_ ? grad_key_offsets_[key] : key * key_channels_;
      value_sum_offsets_[key] = is_value_direct_ ? grad_value_offsets_[key] : key * value_channels_;
    }
    is_whole_ = !walk_.is_wide() && columns.blocks() <= together_;
    if (is_whole_ && columns.blocks() > 0) find_seen(0, columns.blocks(), block_scores_);
  }

  // Starts a sheet that owns these rows of the middle axis.
  void start(Interval rows) {
    rows_ = rows;
    sums_.clear();
  }

  // Blocks that are added together.
  int64_t blocks_together() const { return together_; }

  // Takes on a tile of query rows whose key rows are known. Its blocks are then written where these say.
  void keep(const RowTile& tile) {
    SheetWalk::KeyRow* rows = kept_rows_ + kept_ * sizes_.sources;
    std::copy_n(walk_.key_rows, walk_.key_row_count, rows);
    tile_ = kept_++;
    kept_tiles_[tile_] = {tile.count, rows, walk_.key_row_count};
    if (!is_whole_) find_owned_rows();
  }

  // The weights of the tile's block number `i` of those that are added together, the gradients of their scores, and a
  // row of its queries.
  float* weights(int64_t i) const { return weights_ + tile_ * tile_scores_ + i * block_scores_; }
  float* grad_scores(int64_t i) const { return grad_scores_ + tile_ * tile_scores_ + i * block_scores_; }
  QueryTokens tokens(int64_t i, int r) const {
    const int64_t first = (tile_ * kRows + r) * row_columns_ + i * kLanes;
    return {queries_ + first * key_channels_, grad_outputs_ + first * value_channels_};
  }

  // Multiplies a row of queries by the scale, where the sums of their keys are not multiplied by it in the end.
  void scale_queries(float* queries, int64_t count) const {
    if (!is_key_direct_) return;
    for (int64_t i = 0; i < count * key_channels_; i += kLanes)
      store_lanes(scale_ * load_lanes(queries + i), queries + i);
  }

  // Adds what the queries of `count` blocks of the tile give to their keys, now or with the next tile's.
  void add(int64_t first, int64_t count) {
    if (is_whole_) {
      if (kept_ == tiles_) sum();
      return;
    }
    find_seen(first, count, block_scores_);
    sum_owned_rows();
    if (first + count == walk_.columns.blocks()) kept_ = 0;
  }

  // Adds what the queries of `count` blocks of a wide window give to their keys.
  void add_wide(int64_t first, int64_t count) {
    if (owned_count_ > 0) {
      find_seen(first, count, sizes_.window_scores);
      sum_wide_into(queries_, sizes_.key_vectors, grad_scores_, owned_rows_[0].grad_keys, key_sum_offsets_);
      sum_wide_into(grad_outputs_, sizes_.value_vectors, weights_, owned_rows_[0].grad_values, value_sum_offsets_);
    }
    if (first + count == walk_.columns.blocks()) kept_ = 0;
  }

  // Adds what all tiles give that wait for others.
  void sum() {
    if (kept_ == 0) return;
    find_owned_rows();
    sum_owned_rows();
    kept_ = 0;
  }

  // Writes all gradients of the sheet.
  void finish() {
    for (int64_t slot = 0; slot < sums_.size(); ++slot) flush(slot);
  }

 private:
  static constexpr int64_t kTiles = 4;

  // A key row that the sheet owns, as each of the tiles sees it, or null, and where its gradients are summed.
  struct OwnedRow {
    const SheetWalk::KeyRow* rows[kTiles];
    int64_t p0;
    float* grad_keys;
    float* grad_values;
    bool is_begun;  // whether there is something to add to
  };

  struct KeptTile {
    int count;  // query rows
    const SheetWalk::KeyRow* rows;
    int64_t row_count;
  };

  // Blocks whose weights are kept until their keys' gradients are summed: the more, the fewer keys get theirs in parts.
  static int64_t together(const SheetWalk& walk, const Cut& cut) {
    // With what else a tile needs, they stay in the second cache.
    constexpr int64_t kMostFloats = 65536;
    if (walk.is_wide()) return 1;
    return larger(1, smaller(most_blocks(cut), kMostFloats / (2 * kRows * walk.sizes.window_scores)));
  }

  // Tiles that follow each other whose weights are kept for it as well: a key's sum is then loaded and stored less
  // often.
  static int64_t tiles(const SheetWalk& walk, const Cut& cut) {
    constexpr int64_t kMostFloats = 131072;
    const int64_t floats = 2 * kRows * walk.sizes.window_scores * most_blocks(cut);
    return !walk.is_wide() && together(walk, cut) == most_blocks(cut) ? larger(1, smaller(kTiles, kMostFloats / floats))
                                                                      : 1;
  }

  // Finds the key rows that the sheet owns of those that the kept tiles see, and where their gradients are summed.
  void find_owned_rows() {
    int64_t next[kTiles] = {};
    owned_count_ = 0;
    for (;;) {
      OwnedRow owned = {};
      const SheetWalk::KeyRow* row = nullptr;
      for (int64_t t = 0; t < kept_; ++t)
        if (next[t] < kept_tiles_[t].row_count && (!row || number_of(kept_tiles_[t].rows[next[t]]) < number_of(*row)))
          row = kept_tiles_[t].rows + next[t];
      if (!row) return;
      for (int64_t t = 0; t < kept_; ++t)
        if (next[t] < kept_tiles_[t].row_count && number_of(kept_tiles_[t].rows[next[t]]) == number_of(*row))
          owned.rows[t] = kept_tiles_[t].rows + next[t]++;
      if (row->p1 < rows_.begin || rows_.end <= row->p1) continue;
      const int64_t slot = sums_.slot(row->p0, row->p1);
      owned.p0 = row->p0;
      owned.grad_keys = is_key_direct_ ? direct_row(args_.grad_key, *row) : grad_key_row(slot);
      owned.grad_values = is_value_direct_ ? direct_row(args_.grad_value, *row) : grad_value_row(slot);
      owned.is_begun = sums_.held(slot) == number_of(*row);
      if (!owned.is_begun) {
        flush(slot);
        sums_.held(slot) = number_of(*row);
        clear(owned.grad_keys, key_sum_offsets_, problem_.head_dim);
        clear(owned.grad_values, value_sum_offsets_, problem_.value_dim);
        owned.is_begun = !is_whole_;
      }
      owned_rows_[owned_count_++] = owned;
    }
  }

  int64_t number_of(const SheetWalk::KeyRow& row) const { return row.p0 * walk_.height() + row.p1; }

  // Finds the lanes of `count` blocks, whose weights are `block_step` apart, that see each key column.
  void find_seen(int64_t b, int64_t count, int64_t block_step) {
    const Block &first = walk_.columns.block_at(b), &last = walk_.columns.block_at(b + count - 1);
    const int64_t lanes = last.first + last.count - first.first;
    const int32_t* sizes = walk_.columns.sizes() + first.first;
    const int32_t* starts = walk_.columns.starts() + first.first;
    seen_keys_ = {first.key, first.key};
    for (int64_t i = 0; i < lanes; ++i) seen_keys_.end = larger(seen_keys_.end, starts[i] + sizes[i]);
    for (int64_t key = seen_keys_.begin; key < seen_keys_.end; ++key) {
      seen_begin_[key] = INT32_MAX;
      seen_end_[key] = 0;
    }
    for (int32_t i = 0; i < lanes; ++i) {
      weight_offsets_[i] = static_cast<int32_t>(i / kLanes * block_step + i % kLanes - starts[i] * int64_t{kLanes});
      for (int64_t key = starts[i]; key < starts[i] + sizes[i]; ++key) {
        seen_begin_[key] = i < seen_begin_[key] ? i : seen_begin_[key];
        seen_end_[key] = i + 1;
      }
    }
  }

  // The lanes that see a key column that the sheet owns.
  Interval seeing(int64_t key) const {
    return owned_keys_[key] ? Interval{seen_begin_[key], seen_end_[key]} : Interval{};
  }

  // Adds what the queries of the tiles that are kept give to the gradients of their keys.
  void sum_owned_rows() {
    for (int64_t first = 0; first < owned_count_;) {
      int64_t end = first + 1;
      while (end < owned_count_ && end - first < kRows && owned_rows_[end].p0 == owned_rows_[first].p0) ++end;
      sum_rows(owned_rows_ + first, end - first);
      first = end;
    }
  }

  // Up to kRows key rows that follow each other.
  void sum_rows(const OwnedRow* rows, int64_t count) {
    Source queries[kTiles * kRows], grad_outputs[kTiles * kRows];
    int sources = 0;
    for (int64_t t = 0; t < kept_; ++t) {
      for (int r = 0; r < kept_tiles_[t].count; ++r) {
        const int64_t first = (t * kRows + r) * row_columns_;
        Source source = {queries_ + first * key_channels_, kRows, 0, {}};
        for (int u = 0; u < count; ++u) {
          const SheetWalk::KeyRow* row = rows[u].rows[t];
          if (!row || r < row->begin || row->end <= r) continue;
          source.begin = u < source.begin ? u : source.begin;
          source.end = u + 1;
          source.weights[u] = static_cast<int32_t>(t * tile_scores_) + row->scores[r];
        }
        if (source.end == 0) continue;
        queries[sources] = grad_outputs[sources] = source;
        grad_outputs[sources++].tokens = grad_outputs_ + first * value_channels_;
      }
    }
    float *grad_keys[kRows] = {}, *grad_values[kRows] = {};
    bool is_begun[kRows] = {};
    for (int u = 0; u < count; ++u) {
      grad_keys[u] = rows[u].grad_keys;
      grad_values[u] = rows[u].grad_values;
      is_begun[u] = rows[u].is_begun;
    }
    sum_into(queries, sources, sizes_.key_vectors, grad_scores_, grad_keys, key_sum_offsets_, is_begun);
    sum_into(grad_outputs, sources, sizes_.value_vectors, weights_, grad_values, value_sum_offsets_, is_begun);
  }

  // Adds weighted tokens to the sums of the key columns that they see.
  void sum_into(const Source* sources, int64_t count, int64_t vectors, const float* weights,
                float* const (&rows)[kRows], const int64_t* offsets, const bool (&is_begun)[kRows]) const {
    const int64_t channels = vectors * kLanes;
    for_each_sum(
        seen_keys_.size(), vectors, [&](int64_t key) { return seeing(seen_keys_.begin + key); },
        [&](auto columns, auto width, int64_t key, int64_t vector, const Span& span) NATTEN2_INLINE {
          const int64_t first = seen_keys_.begin + key;
          ColumnSums sums = {sources, count, channels, vector * kLanes, span, {}, {}};
          for (int r = 0; r < kRows; ++r) sums.is_begun[r] = is_begun[r];
          for (int c = 0; c < columns(); ++c)
            for (int r = 0; r < kRows; ++r)
              if (rows[r]) sums.out[c][r] = rows[r] + offsets[first + c] + vector * kLanes;
          sum_key_columns<columns(), width()>(sums, {weights + first * kLanes, weight_offsets_});
        });
  }

  // The same for blocks of a wide window: four key columns at a time.
  void sum_wide_into(const float* tokens, int64_t vectors, const float* weights, float* out,
                     const int64_t* offsets) const {
    const int64_t channels = vectors * kLanes;
    for_each_wide_sum(
        seen_keys_.size(), vectors, [&](int64_t key) { return seeing(seen_keys_.begin + key); },
        [&](auto width, int64_t key, int count, const Interval* parts, int64_t vector) NATTEN2_INLINE {
          const int64_t first = seen_keys_.begin + key;
          const Source row = {tokens, 0, 0, {0, kLanes, 2 * kLanes, 3 * kLanes}};
          Source pieces[2 * kRows];
          const int piece_count = cut_source(row, parts, count, pieces);
          ColumnSums sums = {pieces, piece_count, channels, vector * kLanes, {}, {}, {}};
          for (int r = 0; r < count; ++r) {
            sums.out[0][r] = out + offsets[first + r] + vector * kLanes;
            sums.is_begun[r] = true;
          }
          const KeyWeights first_weights = {weights + first * kLanes, weight_offsets_};
          sum_columns<kParts, kParts, true, 1, width()>(sums, first_weights, 1);
        });
  }

  // Writes the gradients of a key row that no query sees any more.
  void flush(int64_t slot) {
    const int64_t number = sums_.held(slot);
    sums_.held(slot) = -1;
    if (number < 0) return;
    const int64_t p0 = number / walk_.height(), p1 = number % walk_.height();
    if (!is_key_direct_)
      write(grad_key_row(slot), scale_, args_.grad_key, p0, p1, problem_.head_dim, grad_key_offsets_);
    if (!is_value_direct_)
      write(grad_value_row(slot), 1, args_.grad_value, p0, p1, problem_.value_dim, grad_value_offsets_);
  }

  void write(const float* sums, float scale, const View& view, int64_t p0, int64_t p1, int64_t channels,
             const int64_t* offsets) const {
    Storage* out = static_cast<Storage*>(view.data) + walk_.row_offset(view, p0, p1);
    for (int64_t key = 0; key < walk_.columns.keys(); ++key, sums += round_up(channels, kLanes)) {
      if (!owned_keys_[key]) continue;
      for (int64_t channel = 0; channel < channels; channel += kLanes)
        narrow_some(scale * load_lanes(sums + channel), out + offsets[key] + channel, channels - channel);
    }
  }

  // Whether gradients can be summed where they are wanted.
  static bool is_direct(int64_t channels) { return std::is_same_v<Storage, float> && channels % kLanes == 0; }

  float* direct_row(const View& view, const SheetWalk::KeyRow& row) const {
    return static_cast<float*>(view.data) + walk_.row_offset(view, row.p0, row.p1);
  }
  float* grad_key_row(int64_t slot) const { return grad_keys_ + slot * cut_.most_keys * key_channels_; }
  float* grad_value_row(int64_t slot) const { return grad_values_ + slot * cut_.most_keys * value_channels_; }

  // Sets the sums of keys to zero that will be added to.
  void clear(float* sums, const int64_t* offsets, int64_t channels) const {
    for (int64_t key = 0; key < walk_.columns.keys(); ++key)
      if (owned_keys_[key] && !(is_whole_ && is_seen(key))) fill_zero(sums + offsets[key], round_up(channels, kLanes));
  }

  bool is_seen(int64_t key) const {
    return seen_keys_.begin <= key && key < seen_keys_.end && seen_begin_[key] < seen_end_[key];
  }

  const Backward& args_;
  const Problem& problem_;
  const Cut& cut_;
  const SheetWalk& walk_;
  const Sizes& sizes_;
  const float scale_;
  // Whether gradients are summed where they are wanted. Then queries are scaled instead of sums, unless they could
  // overflow where sums don't.
  const bool is_key_direct_, is_value_direct_;
  const int64_t key_channels_, value_channels_;  // of a token, in whole vectors
  const int64_t together_, tiles_;               // blocks and tiles whose weights are kept
  const int64_t row_columns_;                    // between the query rows of a tile
  const int64_t block_scores_, tile_scores_;     // floats
  RowSlots sums_;
  Interval rows_ = {};     // of the middle axis, that the sheet owns
  bool is_whole_ = false;  // whether all blocks of a tile are kept
  Interval seen_keys_ = {};
  KeptTile kept_tiles_[kTiles];
  int64_t kept_ = 0, tile_ = 0;  // tiles, and the one that is being computed
  int64_t owned_count_ = 0;
  int64_t *grad_key_offsets_, *grad_value_offsets_, *key_sum_offsets_, *value_sum_offsets_;
  int32_t *owned_keys_, *seen_begin_, *seen_end_, *weight_offsets_;
  SheetWalk::KeyRow* kept_rows_;
  OwnedRow* owned_rows_;
  float *grad_keys_, *grad_values_;  // unless direct
  float *queries_, *grad_outputs_, *weights_, *grad_scores_;
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

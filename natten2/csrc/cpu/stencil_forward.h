// Forward of small windows: scores, softmax, and sums of values of a tile of query rows, block by block.
#pragma once

#include "stencil.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

template <class Storage>
class StencilForward {
 public:
  StencilForward(const Forward& args, const Cut& cut, Arena& arena)
      : args_(args),
        problem_(args.problem),
        cut_(cut),
        walk_(args, cut, arena),
        sizes_(walk_.sizes),
        score_head_dim_(score_channels<Storage>(problem_.head_dim)),
        query_offsets_(arena.take<int64_t>(cut.most_queries)),
        key_offsets_(arena.take<int64_t>(cut.most_keys)),
        value_offsets_(arena.take<int64_t>(cut.most_keys)),
        output_offsets_(arena.take<int64_t>(cut.most_queries)),
        logsumexp_offsets_(arena.take<int64_t>(cut.most_queries)),
        lines_{lines(arena), lines(arena), lines(arena)},
        sources_(arena.take<Source>(sizes_.sources)),
        keys_(arena.take<float>(walk_.slots.size() * score_head_dim_ * sizes_.pitch)),
        values_(arena.take<float>(walk_.slots.size() * cut.most_keys * sizes_.value_vectors * kLanes)),
        queries_(arena.take<float>(kRows * score_head_dim_ * kLanes)),
        scores_(arena.take<float>(kRows * sizes_.window_scores)) {}

  // Runs `strips` strips that follow each other.
  void run(const Sheet& sheet, int64_t p0, int64_t strips) {
    if (walk_.start(sheet)) {
      walk_.columns.query_offsets(args_.query, sizes_.heads_per_key, query_offsets_);
      walk_.columns.query_offsets(args_.output, sizes_.heads_per_key, output_offsets_);
      walk_.columns.query_offsets(args_.logsumexp, sizes_.heads_per_key, logsumexp_offsets_);
      walk_.columns.key_offsets(args_.key, key_offsets_);
      walk_.columns.key_offsets(args_.value, value_offsets_);
      walk_.clear_padding(keys_, score_head_dim_);
      lines_[0].template start<Storage>(query_offsets_, walk_.columns.queries(), problem_.head_dim);
      lines_[1].template start<Storage>(key_offsets_, walk_.columns.keys(), problem_.head_dim);
      lines_[2].template start<Storage>(value_offsets_, walk_.columns.keys(), problem_.value_dim);
    }
    const int64_t depth = walk_.depth(), height = walk_.height();
    if (p0 >= depth || walk_.columns.queries() == 0) return;
    const Interval rows = {smaller(height, sheet.strip * cut_.rows),
                           smaller(height, (sheet.strip + strips) * cut_.rows)};
    for_each_row_tile(problem_, height, depth, p0, rows, [&](const RowTile& tile) { run_tile(tile); });
  }

  // The rest is public for a benchmark, which times these one by one.
  void run_tile(const RowTile& tile) {
    walk_.find_key_rows(tile, [&](const SheetWalk::KeyRow& row) {
      const int64_t count = walk_.columns.keys();
      load_scored(static_cast<const Storage*>(args_.key.data) + walk_.row_offset(args_.key, row.p0, row.p1),
                  key_offsets_, count, problem_.head_dim, keys_ + row.slot * score_head_dim_ * sizes_.pitch,
                  sizes_.pitch);
      load_by_token(static_cast<const Storage*>(args_.value.data) + walk_.row_offset(args_.value, row.p0, row.p1),
                    value_offsets_, count, problem_.value_dim, value_row(row.slot));
    });
    for (int64_t s = 0; s < walk_.key_row_count; ++s) {
      const SheetWalk::KeyRow& row = walk_.key_rows[s];
      sources_[s] = {value_row(row.slot), row.begin, row.end, {}};
      for (int r = 0; r < kRows; ++r) sources_[s].weights[r] = row.scores[r];
    }
    if (walk_.is_wide()) return run_wide(tile);
    for (int64_t b = 0; b < walk_.columns.blocks(); ++b) run_block(tile, b);
  }

  void run_block(const RowTile& tile, int64_t b) {
    const Block& block = walk_.columns.block_at(b);
    for (int r = 0; r < tile.count; ++r) load_queries(tile, r, block);
    walk_.template score_block<kInPairs<Storage>>(tile, b, keys_, queries_, score_head_dim_, args_.rpb,
                                                  static_cast<float>(problem_.scale), scores_,
                                                  [&](int64_t s) { return ahead(tile, b, s); });
    for (int r = 0; r < tile.count; ++r) weigh(tile, r, block);
    for (int r = 0; r < tile.count; ++r) write_logsumexp(tile, r, block);
    sum_values(tile, block);
  }

  // Blocks of a wide window are the rows of a tile.
  void run_wide(const RowTile& tile) {
    RowTile rows = walk_.repeated(tile);
    for (int64_t b = 0; b < walk_.columns.blocks(); b += rows.count) {
      rows.count = walk_.blocks_together(b);
      for (int r = 0; r < rows.count; ++r) load_queries(rows, r, walk_.columns.block_at(b + r));
      walk_.template score_blocks<kInPairs<Storage>>(tile, b, rows.count, keys_, queries_, score_head_dim_, args_.rpb,
                                                     static_cast<float>(problem_.scale), scores_);
      Storage* row = row_of<Storage>(args_.output, tile, 0);
      for (int r = 0; r < rows.count; ++r) {
        const Block& block = walk_.columns.block_at(b + r);
        weigh(rows, r, block);
        write_logsumexp(rows, r, block);
        const int64_t* offsets = output_offsets_ + block.first;
        sum_wide_queries<Storage>(walk_.columns, block, sources_[0].tokens, scores_ + r * sizes_.window_scores,
                                  problem_.value_dim, 1, [&](int64_t column) { return row + offsets[column]; });
      }
    }
  }

  // What is read soon: number `n` of the rows.
  Ahead ahead(const RowTile& tile, int64_t b, int64_t n) const {
    if (n < kRows) return walk_.template queries_ahead<Storage>(args_.query, lines_[0], tile, b, static_cast<int>(n));
    n -= kRows;
    const bool is_key = n / kRows % 2 == 0;
    return walk_.template keys_ahead<Storage>(is_key ? args_.key : args_.value, lines_[is_key ? 1 : 2], tile, b,
                                              n / (2 * kRows) * kRows + n % kRows);
  }

  void load_queries(const RowTile& tile, int r, const Block& block) {
    load_scored(row_of<const Storage>(args_.query, tile, r), query_offsets_ + block.first, block.count,
                problem_.head_dim, queries_ + r * score_head_dim_ * kLanes, kLanes);
  }

  // Turns the scores of a query row into weights.
  void weigh(const RowTile& tile, int r, const Block& block) {
    walk_.hide(tile, r, block, -std::numeric_limits<float>::infinity(), scores_);
    const Lanes infinity = splat(std::numeric_limits<float>::infinity());
    Lanes most = -infinity;
    walk_.for_each_piece(tile, r, [&](int64_t first, int64_t vectors) {
      const float* scores = scores_ + first;
      Lanes other = most;
      int64_t i = 0;
      for (; i + 2 <= vectors; i += 2) {
        most = larger_lanes(load_lanes(scores + i * kLanes), most);
        other = larger_lanes(load_lanes(scores + (i + 1) * kLanes), other);
      }
      if (i < vectors) most = larger_lanes(load_lanes(scores + i * kLanes), most);
      most = larger_lanes(other, most);
    });
    const Lanes shift = most - most == Lanes{} ? most : Lanes{};
    Lanes total = {};
    walk_.for_each_piece(tile, r, [&](int64_t first, int64_t vectors) {
      float* scores = scores_ + first;
      for_each_few(vectors, [&](int64_t i, auto few) NATTEN2_INLINE {
        Lanes weights[few()];
        unrolled<0, few()>([&](auto j) NATTEN2_INLINE { weights[j] = load_lanes(scores + (i + j) * kLanes) - shift; });
        exponentiate(weights);
        unrolled<0, few()>([&](auto j) NATTEN2_INLINE {
          total += weights[j];
          store_lanes(weights[j], scores + (i + j) * kLanes);
        });
      });
    });
    // Before the values are summed: their sum could overflow where their mean doesn't.
    const Lanes factor = 1.0f / total;
    walk_.for_each_piece(tile, r, [&](int64_t first, int64_t vectors) {
      float* scores = scores_ + first;
      for (int64_t i = 0; i < vectors; ++i) store_lanes(factor * load_lanes(scores + i * kLanes), scores + i * kLanes);
    });
    shift_[r] = shift;
    total_[r] = total;
  }

  // Apart from the weights, so that the rows' logarithms, long chains of operations, run side by side.
  void write_logsumexp(const RowTile& tile, int r, const Block& block) const {
    const Lanes logsumexp = shift_[r] + logarithm(total_[r]);
    float* out = row_of<float>(args_.logsumexp, tile, r);
    for (int64_t i = 0; i < block.count; ++i) out[logsumexp_offsets_[block.first + i]] = logsumexp[i];
  }

  void sum_values(const RowTile& tile, const Block& block) {
    Storage* rows[kRows] = {};
    for (int r = 0; r < tile.count; ++r) rows[r] = row_of<Storage>(args_.output, tile, r);
    const int64_t* offsets = output_offsets_ + block.first;
    sum_queries<Storage>(walk_.columns, block, sources_, walk_.key_row_count, scores_, problem_.value_dim, 1,
                         [&](int r, int64_t column) { return rows[r] ? rows[r] + offsets[column] : nullptr; });
  }

 private:
  Lines lines(Arena& arena) const { return {walk_.is_wide() ? 0 : most_blocks(cut_), problem_.head_dim, arena}; }

  template <class T>
  T* row_of(const View& view, const RowTile& tile, int r) const {
    return static_cast<T*>(view.data) + walk_.row_offset(view, tile.p0, tile.p1[r], tile.head[r]);
  }

  float* value_row(int64_t slot) const { return values_ + slot * cut_.most_keys * sizes_.value_vectors * kLanes; }

  const Forward& args_;
  const Problem& problem_;
  const Cut& cut_;
  SheetWalk walk_;
  const Sizes& sizes_;
  const int64_t score_head_dim_;  // what scores run over: channels, or pairs of them
  int64_t* query_offsets_;
  int64_t* key_offsets_;
  int64_t* value_offsets_;
  int64_t* output_offsets_;
  int64_t* logsumexp_offsets_;
  Lines lines_[3];  // of queries, keys, and values
  Source* sources_;
  float* keys_;    // by channel
  float* values_;  // by token
  float* queries_;
  float* scores_;
  Lanes shift_[kRows];  // of the scores of each query row
  Lanes total_[kRows];  // of their weights, before they are divided by it
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

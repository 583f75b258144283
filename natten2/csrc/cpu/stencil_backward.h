// Backward of small windows. A sheet visits every query that sees a key of its own, computes their weights and the
// gradients of their scores, and adds those to its own queries', keys', and values' gradients: one owner for each.
#pragma once

#include "stencil.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

template <class Storage>
class StencilBackward {
 public:
  StencilBackward(const Backward& args, const Cut& cut, Arena& arena)
      : args_(args),
        problem_(args.forward.problem),
        cut_(cut),
        walk_(args.forward, cut, arena),
        sizes_(walk_.sizes),
        key_channels_(sizes_.key_vectors * kLanes),
        value_channels_(sizes_.value_vectors * kLanes),
        score_head_dim_(score_channels<Storage>(problem_.head_dim)),
        score_value_dim_(score_channels<Storage>(problem_.value_dim)),
        together_(together(walk_, cut)),
        row_columns_(walk_.is_wide() ? kLanes : together_ * kLanes),
        block_scores_(kRows * sizes_.window_scores),
        sums_(cut.row_slots[0], problem_.axes[0].length > 1 ? cut.rows : cut.row_slots[1], arena),
        query_offsets_(arena.take<int64_t>(cut.most_queries)),
        output_offsets_(arena.take<int64_t>(cut.most_queries)),
        grad_output_offsets_(arena.take<int64_t>(cut.most_queries)),
        logsumexp_offsets_(arena.take<int64_t>(cut.most_queries)),
        grad_logsumexp_offsets_(arena.take<int64_t>(cut.most_queries)),
        grad_query_offsets_(arena.take<int64_t>(cut.most_queries)),
        key_offsets_(arena.take<int64_t>(cut.most_keys)),
        value_offsets_(arena.take<int64_t>(cut.most_keys)),
        grad_key_offsets_(arena.take<int64_t>(cut.most_keys)),
        grad_value_offsets_(arena.take<int64_t>(cut.most_keys)),
        owned_keys_(arena.take<int32_t>(cut.most_keys)),
        seen_begin_(arena.take<int32_t>(cut.most_keys)),
        seen_end_(arena.take<int32_t>(cut.most_keys)),
        weight_offsets_(arena.take<int32_t>(larger(kRows, together_) * kLanes)),
        lines_{lines(arena), lines(arena), lines(arena), lines(arena), lines(arena)},
        sources_(arena.take<Source>(sizes_.sources)),
        owned_rows_(arena.take<OwnedRow>(sizes_.sources)),
        keys_by_channel_(arena.take<float>(walk_.slots.size() * score_head_dim_ * sizes_.pitch)),
        values_by_channel_(arena.take<float>(walk_.slots.size() * score_value_dim_ * sizes_.pitch)),
        keys_(arena.take<float>(walk_.slots.size() * cut.most_keys * key_channels_)),
        grad_keys_(arena.take<float>(sums_.size() * cut.most_keys * key_channels_)),
        grad_values_(arena.take<float>(sums_.size() * cut.most_keys * value_channels_)),
        queries_(arena.take<float>(kRows * row_columns_ * key_channels_)),
        grad_outputs_(arena.take<float>(kRows * row_columns_ * value_channels_)),
        queries_by_channel_(arena.take<float>(kRows * score_head_dim_ * kLanes)),
        grad_outputs_by_channel_(arena.take<float>(kRows * score_value_dim_ * kLanes)),
        weights_(arena.take<float>(together_ * block_scores_)),
        grad_scores_(arena.take<float>(together_ * block_scores_)),
        grad_bias_size_(args.grad_rpb_parts ? sizes_.heads_per_key * most_blocks(cut) * sizes_.block_bias : 0),
        grad_bias_(arena.take<float>(grad_bias_size_)) {}

  void start() { fill_zero(grad_bias_, grad_bias_size_); }

  // Runs `strips` strips that follow each other, several only where there is one plane, and calls `end_strip` when a
  // strip's share of the bias's gradient is summed up.
  template <class EndStrip>
  void run(const Sheet& sheet, int64_t strips, EndStrip&& end_strip) {
    if (walk_.start(sheet)) start_columns();
    sums_.clear();
    const int64_t depth = walk_.depth(), height = walk_.height();
    rows_ = {smaller(height, sheet.strip * cut_.rows), smaller(height, (sheet.strip + strips) * cut_.rows)};
    int64_t strip = sheet.strip;
    if (rows_.size() > 0 && walk_.columns.queries() > 0) {
      const Interval queries = visited(Visit::kSeeing, problem_.axes[1], height, rows_);
      for (int64_t p0 = 0; p0 < depth; ++p0)
        for_each_row_tile(problem_, height, depth, p0, queries, [&](const RowTile& tile) {
          for (; strip + 1 < sheet.strip + strips && tile.p1[0] >= (strip + 1) * cut_.rows; ++strip) end_strip();
          run_tile(tile);
        });
      for (int64_t slot = 0; slot < sums_.size(); ++slot) flush(slot);
    }
    for (; strip < sheet.strip + strips; ++strip) end_strip();
  }

  // Adds the gradient of the bias, which all sheets since `start` have summed up, to the heads'. Every chunk that has
  // lines of a head has `parts` of its own.
  void finish(int64_t parts, int64_t part) {
    if (!args_.grad_rpb_parts) return;
    const int64_t keys = problem_.axes[2].kernel_size, entries = bias_entries(problem_.axes[2]);
    const int64_t size = offsets(problem_);
    const float* sums = grad_bias_;
    for (int64_t g = 0; g < sizes_.heads_per_key; ++g) {
      for (int64_t b = 0; b < walk_.columns.blocks(); ++b, sums += sizes_.block_bias) {
        const Block& block = walk_.columns.block_at(b);
        for (int64_t i = 0; i < block.count; ++i) {
          const int64_t column = block.first + i, entry = walk_.columns.bias()[column];
          if (!walk_.columns.owned()[column]) continue;
          const int64_t first_head = entry / size, key_head = first_head / sizes_.heads_per_key;
          const int64_t first_chunk = key_head * problem_.axes[2].dilation / cut_.lines_together;
          const int64_t own_part = (walk_.sheet.chunk - first_chunk) * parts + part;
          double* out = args_.grad_rpb_parts + ((first_head + g) * args_.parts + own_part) * size + entry % size;
          for (int64_t row = 0; row < bias_entries(problem_.axes[0]) * sizes_.bias_rows; ++row)
            for (int64_t k = 0; k < walk_.columns.sizes()[column]; ++k)
              out[row * entries + k] += sums[(row * keys + k) * kLanes + i];
        }
      }
    }
  }

 private:
  // A key row that the sheet owns, and where its gradients are summed.
  struct OwnedRow {
    const SheetWalk::KeyRow* row;
    float* grad_keys;
    float* grad_values;
  };

  // Blocks whose weights are kept until their keys' gradients are summed: the more, the fewer keys get theirs in parts.
  static int64_t together(const SheetWalk& walk, const Cut& cut) {
    // With what else a tile needs, they stay in the second cache.
    constexpr int64_t kMostFloats = 65536;
    if (walk.is_wide()) return 1;
    return larger(1, smaller(most_blocks(cut), kMostFloats / (2 * kRows * walk.sizes.window_scores)));
  }

  Lines lines(Arena& arena) const {
    return {walk_.is_wide() ? 0 : most_blocks(cut_), larger(problem_.head_dim, problem_.value_dim), arena};
  }

  void start_columns() {
    const Columns& columns = walk_.columns;
    const Forward& forward = args_.forward;
    columns.query_offsets(forward.query, sizes_.heads_per_key, query_offsets_);
    columns.query_offsets(forward.output, sizes_.heads_per_key, output_offsets_);
    columns.query_offsets(args_.grad_output, sizes_.heads_per_key, grad_output_offsets_);
    columns.query_offsets(forward.logsumexp, sizes_.heads_per_key, logsumexp_offsets_);
    columns.query_offsets(args_.grad_logsumexp, sizes_.heads_per_key, grad_logsumexp_offsets_);
    columns.query_offsets(args_.grad_query, sizes_.heads_per_key, grad_query_offsets_);
    columns.key_offsets(forward.key, key_offsets_);
    columns.key_offsets(forward.value, value_offsets_);
    columns.key_offsets(args_.grad_key, grad_key_offsets_);
    columns.key_offsets(args_.grad_value, grad_value_offsets_);
    for (int64_t l = 0; l < columns.line_count(); ++l) {
      const Line& line = columns.line(l);
      for (int64_t p = line.keys.begin; p < line.keys.end; ++p)
        owned_keys_[line.key_column + p - line.keys.begin] = line.owned.begin <= p && p < line.owned.end;
    }
    lines_[0].template start<Storage>(query_offsets_, columns.queries(), problem_.head_dim);
    lines_[1].template start<Storage>(grad_output_offsets_, columns.queries(), problem_.value_dim);
    lines_[2].template start<Storage>(output_offsets_, columns.queries(), problem_.value_dim);
    lines_[3].template start<Storage>(key_offsets_, columns.keys(), problem_.head_dim);
    lines_[4].template start<Storage>(value_offsets_, columns.keys(), problem_.value_dim);
    found_ = -1;
    walk_.clear_padding(keys_by_channel_, score_head_dim_);
    walk_.clear_padding(values_by_channel_, score_value_dim_);
  }

  void run_tile(const RowTile& tile) {
    walk_.find_key_rows(tile, [&](const SheetWalk::KeyRow& row) { load_key_row(row); });
    owned_count_ = 0;
    for (int64_t s = 0; s < walk_.key_row_count; ++s) {
      const SheetWalk::KeyRow& row = walk_.key_rows[s];
      sources_[s] = {keys_ + row.slot * cut_.most_keys * key_channels_, row.begin, row.end, {}};
      for (int r = 0; r < kRows; ++r) sources_[s].weights[r] = row.scores[r];
      if (row.p1 < rows_.begin || rows_.end <= row.p1) continue;
      const int64_t slot = sums_.slot(row.p0, row.p1), number = row.p0 * walk_.height() + row.p1;
      if (sums_.held(slot) != number) {
        flush(slot);
        sums_.held(slot) = number;
        fill_zero(grad_key_row(slot), walk_.columns.keys() * key_channels_);
        fill_zero(grad_value_row(slot), walk_.columns.keys() * value_channels_);
      }
      owned_rows_[owned_count_++] = {&row, grad_key_row(slot), grad_value_row(slot)};
    }
    if (walk_.is_wide()) return run_wide(tile);
    for (int64_t first = 0; first < walk_.columns.blocks(); first += together_) {
      const int64_t count = smaller(together_, walk_.columns.blocks() - first);
      for (int64_t i = 0; i < count; ++i) run_block(tile, first + i, i);
      if (found_ != first) find_seen(first, count, block_scores_);
      found_ = first;
      sum_grad_keys(tile);
    }
  }

  void load_key_row(const SheetWalk::KeyRow& row) {
    const Forward& forward = args_.forward;
    const int64_t count = walk_.columns.keys();
    const Storage* keys = data<const Storage>(forward.key) + walk_.row_offset(forward.key, row.p0, row.p1);
    const Storage* values = data<const Storage>(forward.value) + walk_.row_offset(forward.value, row.p0, row.p1);
    load_scored(keys, key_offsets_, count, problem_.head_dim,
                keys_by_channel_ + row.slot * score_head_dim_ * sizes_.pitch, sizes_.pitch);
    load_scored(values, value_offsets_, count, problem_.value_dim,
                values_by_channel_ + row.slot * score_value_dim_ * sizes_.pitch, sizes_.pitch);
    load_by_token(keys, key_offsets_, count, problem_.head_dim, keys_ + row.slot * cut_.most_keys * key_channels_);
  }

  // All that a block needs on its own: its keys' gradients wait for those of its neighbors. It is number `i` of those
  // that are kept.
  void run_block(const RowTile& tile, int64_t b, int64_t i) {
    const Block& block = walk_.columns.block_at(b);
    float *weights = weights_ + i * block_scores_, *grad_scores = grad_scores_ + i * block_scores_;
    for (int r = 0; r < tile.count; ++r) load_queries(tile, block, r, r * row_columns_ + i * kLanes);
    walk_.template score_block<kInPairs<Storage>>(tile, b, keys_by_channel_, queries_by_channel_, score_head_dim_,
                                                  args_.forward.rpb, static_cast<float>(problem_.scale), weights,
                                                  [&](int64_t s) { return ahead(tile, b, s); });
    walk_.template score_block<kInPairs<Storage>>(tile, b, values_by_channel_, grad_outputs_by_channel_,
                                                  score_value_dim_, false, 1, grad_scores,
                                                  [&](int64_t s) { return ahead(tile, b, walk_.key_row_count + s); });
    for (int r = 0; r < tile.count; ++r) weigh(tile, r, block, weights, grad_scores);
    if (grad_bias_size_ > 0) add_bias(tile, b, grad_scores);
    sum_grad_queries(tile, block, grad_scores);
  }

  // What is read soon: number `n` of the rows.
  Ahead ahead(const RowTile& tile, int64_t b, int64_t n) const {
    const View* const views[] = {&args_.forward.query, &args_.grad_output, &args_.forward.output, &args_.forward.key,
                                 &args_.forward.value};
    const int64_t i = n / kRows;
    if (i < 3) return walk_.template queries_ahead<Storage>(*views[i], lines_[i], tile, b, static_cast<int>(n % kRows));
    const int64_t k = 3 + (i - 3) % 2;
    return walk_.template keys_ahead<Storage>(*views[k], lines_[k], tile, b, (i - 3) / 2 * kRows + n % kRows);
  }

  // Blocks of a wide window are the rows of a tile.
  void run_wide(const RowTile& tile) {
    RowTile rows = walk_.repeated(tile);
    const float scale = static_cast<float>(problem_.scale);
    for (int64_t b = 0; b < walk_.columns.blocks(); b += rows.count) {
      rows.count = walk_.blocks_together(b);
      for (int r = 0; r < rows.count; ++r) load_queries(rows, walk_.columns.block_at(b + r), r, r * kLanes);
      walk_.template score_blocks<kInPairs<Storage>>(tile, b, rows.count, keys_by_channel_, queries_by_channel_,
                                                     score_head_dim_, args_.forward.rpb, scale, weights_);
      walk_.template score_blocks<kInPairs<Storage>>(tile, b, rows.count, values_by_channel_, grad_outputs_by_channel_,
                                                     score_value_dim_, false, 1, grad_scores_);
      Storage* row = row_of<Storage>(args_.grad_query, tile, 0);
      for (int r = 0; r < rows.count; ++r) {
        const Block& block = walk_.columns.block_at(b + r);
        weigh(rows, r, block, weights_, grad_scores_);
        const float* grad_scores = grad_scores_ + r * sizes_.window_scores;
        if (grad_bias_size_ > 0)
          add_row(grad_scores, grad_bias_ + walk_.bias_offset(tile, 0, walk_.key_rows[0], b + r));
        const int64_t* offsets = grad_query_offsets_ + block.first;
        const int32_t* owned = walk_.columns.owned() + block.first;
        sum_wide_queries<Storage>(walk_.columns, block, sources_[0].tokens, grad_scores, problem_.head_dim, scale,
                                  [&](int64_t column) { return owned[column] ? row + offsets[column] : nullptr; });
      }
      if (owned_count_ == 0) continue;
      find_seen(b, rows.count, sizes_.window_scores);
      sum_wide_into(queries_, sizes_.key_vectors, grad_scores_, owned_rows_[0].grad_keys);
      sum_wide_into(grad_outputs_, sizes_.value_vectors, weights_, owned_rows_[0].grad_values);
    }
  }

  // Turns the scores of a query row into weights, and their gradients into those of the scores.
  void weigh(const RowTile& tile, int r, const Block& block, float* all_weights, float* all_grad_scores) {
    const Lanes logsumexp = logsumexp_[r], delta = delta_[r];
    walk_.for_each_piece(tile, r, [&](int64_t first, int64_t vectors) {
      float *weights = all_weights + first, *grad_scores = all_grad_scores + first;
      for (int64_t i = 0; i < vectors; ++i, weights += kLanes, grad_scores += kLanes) {
        const Lanes weight = exponential(load_lanes(weights) - logsumexp);
        store_lanes(weight, weights);
        store_lanes(weight * (load_lanes(grad_scores) - delta), grad_scores);
      }
    });
    walk_.hide(tile, r, block, 0, all_grad_scores);
  }

  // Loads a row of queries and what belongs to them: by token, from number `first` on, and by channel.
  void load_queries(const RowTile& tile, const Block& block, int r, int64_t first) {
    int64_t offsets[kLanes];
    const auto load_both = [&](const View& view, const int64_t* token_offsets, int64_t channels, int64_t width,
                               float* by_token, float* by_channel) {
      const Storage* row = row_of<const Storage>(view, tile, r);
      load_by_token(row, token_offsets + block.first, block.count, channels, by_token);
      if constexpr (kInPairs<Storage>) {
        load_scored(row, token_offsets + block.first, block.count, channels, by_channel, kLanes);
      } else {
        for (int64_t i = 0; i < kLanes; ++i) offsets[i] = i * width;
        load_scored<float>(by_token, offsets, block.count, channels, by_channel, kLanes);
      }
    };
    float* grad_outputs = grad_outputs_ + first * value_channels_;
    load_both(args_.forward.query, query_offsets_, problem_.head_dim, key_channels_, queries_ + first * key_channels_,
              queries_by_channel_ + r * score_head_dim_ * kLanes);
    load_both(args_.grad_output, grad_output_offsets_, problem_.value_dim, value_channels_, grad_outputs,
              grad_outputs_by_channel_ + r * score_value_dim_ * kLanes);
    const Storage* outputs = row_of<const Storage>(args_.forward.output, tile, r);
    const float* logsumexps = row_of<const float>(args_.forward.logsumexp, tile, r);
    const float* grad_logsumexps =
        args_.grad_logsumexp.data ? row_of<const float>(args_.grad_logsumexp, tile, r) : nullptr;
    logsumexp_[r] = Lanes{};
    Lanes products[kLanes] = {}, grads = {};
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t column = block.first + i;
      Lanes product = {};
      for (int64_t channel = 0; channel < problem_.value_dim; channel += kLanes)
        product += widen_some(outputs + output_offsets_[column] + channel, problem_.value_dim - channel) *
                   load_lanes(grad_outputs + i * value_channels_ + channel);
      products[i] = product;
      if (grad_logsumexps) grads[i] = grad_logsumexps[grad_logsumexp_offsets_[column]];
      logsumexp_[r][i] = logsumexps[logsumexp_offsets_[column]];
    }
    transpose(products);
    delta_[r] = -grads;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) delta_[r] += products[i];
  }

  // Adds the gradients of a block's scores to those of the bias, by slot and lane.
  void add_bias(const RowTile& tile, int64_t b, const float* grad_scores) {
    for (int64_t s = 0; s < walk_.key_row_count; ++s) {
      const SheetWalk::KeyRow& row = walk_.key_rows[s];
      for (int r = row.begin; r < row.end; ++r) {
        if (owns(tile, r)) add_row(grad_scores + row.scores[r], grad_bias_ + walk_.bias_offset(tile, r, row, b));
      }
    }
  }

  void add_row(const float* grads, float* sums) const {
    for (int64_t i = 0; i < sizes_.row_scores; i += kLanes)
      store_lanes(load_lanes(sums + i) + load_lanes(grads + i), sums + i);
  }

  void sum_grad_queries(const RowTile& tile, const Block& block, const float* grad_scores) {
    Storage* rows[kRows] = {};
    for (int r = 0; r < tile.count; ++r)
      if (owns(tile, r)) rows[r] = row_of<Storage>(args_.grad_query, tile, r);
    const int64_t* offsets = grad_query_offsets_ + block.first;
    const int32_t* owned = walk_.columns.owned() + block.first;
    sum_queries<Storage>(walk_.columns, block, sources_, walk_.key_row_count, grad_scores, problem_.head_dim,
                         static_cast<float>(problem_.scale), [&](int r, int64_t column) {
                           return rows[r] && owned[column] ? rows[r] + offsets[column] : nullptr;
                         });
  }

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

  // Adds what the queries of the blocks that are kept give to the gradients of their keys.
  void sum_grad_keys(const RowTile& tile) {
    for (int64_t first = 0; first < owned_count_;) {
      int64_t end = first + 1;
      while (end < owned_count_ && end - first < kRows && owned_rows_[end].row->p0 == owned_rows_[first].row->p0) ++end;
      sum_grad_keys(tile, owned_rows_ + first, end - first);
      first = end;
    }
  }

  // Up to kRows key rows that follow each other.
  void sum_grad_keys(const RowTile& tile, const OwnedRow* rows, int64_t count) {
    Source queries[kRows], grad_outputs[kRows];
    int sources = 0;
    for (int r = 0; r < tile.count; ++r) {
      Source source = {queries_ + r * row_columns_ * key_channels_, kRows, 0, {}};
      for (int u = 0; u < count; ++u) {
        if (r < rows[u].row->begin || rows[u].row->end <= r) continue;
        source.begin = u < source.begin ? u : source.begin;
        source.end = u + 1;
        source.weights[u] = rows[u].row->scores[r];
      }
      if (source.end == 0) continue;
      queries[sources] = grad_outputs[sources] = source;
      grad_outputs[sources++].tokens = grad_outputs_ + r * row_columns_ * value_channels_;
    }
    float *grad_keys[kRows] = {}, *grad_values[kRows] = {};
    for (int u = 0; u < count; ++u) {
      grad_keys[u] = rows[u].grad_keys;
      grad_values[u] = rows[u].grad_values;
    }
    sum_into(queries, sources, sizes_.key_vectors, grad_scores_, grad_keys);
    sum_into(grad_outputs, sources, sizes_.value_vectors, weights_, grad_values);
  }

  // Adds weighted tokens to the sums of the key columns that they see.
  void sum_into(const Source* sources, int64_t count, int64_t vectors, const float* weights,
                float* const (&rows)[kRows]) const {
    const int64_t channels = vectors * kLanes;
    for_each_sum(
        seen_keys_.size(), vectors, [&](int64_t key) { return seeing(seen_keys_.begin + key); },
        [&](auto columns, auto width, int64_t key, int64_t vector, const Span& span) NATTEN2_INLINE {
          const int64_t first = seen_keys_.begin + key;
          ColumnSums sums = {sources, count, channels, vector * kLanes, span, {}};
          for (int c = 0; c < columns(); ++c)
            for (int r = 0; r < kRows; ++r)
              if (rows[r]) sums.out[c][r] = rows[r] + (first + c) * channels + vector * kLanes;
          sum_key_columns<columns(), width()>(sums, {weights + first * kLanes, weight_offsets_});
        });
  }

  // The same for blocks of a wide window: four key columns at a time.
  void sum_wide_into(const float* tokens, int64_t vectors, const float* weights, float* out) const {
    const int64_t channels = vectors * kLanes;
    for_each_wide_sum(
        seen_keys_.size(), vectors, [&](int64_t key) { return seeing(seen_keys_.begin + key); },
        [&](auto width, int64_t key, int count, const Interval* parts, int64_t vector) NATTEN2_INLINE {
          const int64_t first = seen_keys_.begin + key;
          const Source row = {tokens, 0, 0, {0, kLanes, 2 * kLanes, 3 * kLanes}};
          Source pieces[2 * kRows];
          const int piece_count = cut_source(row, parts, count, pieces);
          ColumnSums sums = {pieces, piece_count, channels, vector * kLanes, {}, {}};
          for (int r = 0; r < count; ++r) sums.out[0][r] = out + (first + r) * channels + vector * kLanes;
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
    const float *grad_keys = grad_key_row(slot), *grad_values = grad_value_row(slot);
    Storage* key_out = data<Storage>(args_.grad_key) + walk_.row_offset(args_.grad_key, p0, p1);
    Storage* value_out = data<Storage>(args_.grad_value) + walk_.row_offset(args_.grad_value, p0, p1);
    const float scale = static_cast<float>(problem_.scale);
    for (int64_t key = 0; key < walk_.columns.keys(); ++key) {
      if (!owned_keys_[key]) continue;
      for (int64_t channel = 0; channel < problem_.head_dim; channel += kLanes)
        narrow_some(scale * load_lanes(grad_keys + key * key_channels_ + channel),
                    key_out + grad_key_offsets_[key] + channel, problem_.head_dim - channel);
      for (int64_t channel = 0; channel < problem_.value_dim; channel += kLanes)
        narrow_some(load_lanes(grad_values + key * value_channels_ + channel),
                    value_out + grad_value_offsets_[key] + channel, problem_.value_dim - channel);
    }
  }

  bool owns(const RowTile& tile, int r) const { return rows_.begin <= tile.p1[r] && tile.p1[r] < rows_.end; }

  template <class T>
  static T* data(const View& view) {
    return static_cast<T*>(view.data);
  }
  template <class T>
  T* row_of(const View& view, const RowTile& tile, int r) const {
    return data<T>(view) + walk_.row_offset(view, tile.p0, tile.p1[r], tile.head[r]);
  }
  float* grad_key_row(int64_t slot) const { return grad_keys_ + slot * cut_.most_keys * key_channels_; }
  float* grad_value_row(int64_t slot) const { return grad_values_ + slot * cut_.most_keys * value_channels_; }

  const Backward& args_;
  const Problem& problem_;
  const Cut& cut_;
  SheetWalk walk_;
  const Sizes& sizes_;
  const int64_t key_channels_, value_channels_;     // of a token, in whole vectors
  const int64_t score_head_dim_, score_value_dim_;  // what scores run over: channels, or pairs of them
  const int64_t together_;                          // blocks
  const int64_t row_columns_;                       // between the query rows of a tile
  const int64_t block_scores_;
  RowSlots sums_;
  Interval rows_ = {};  // of the middle axis, that the sheet owns
  Interval seen_keys_ = {};
  int64_t owned_count_ = 0;
  int64_t found_ = -1;  // the first of the blocks whose seen keys are known
  Lanes logsumexp_[kRows];
  Lanes delta_[kRows];
  int64_t *query_offsets_, *output_offsets_, *grad_output_offsets_, *logsumexp_offsets_, *grad_logsumexp_offsets_;
  int64_t *grad_query_offsets_, *key_offsets_, *value_offsets_, *grad_key_offsets_, *grad_value_offsets_;
  int32_t *owned_keys_, *seen_begin_, *seen_end_, *weight_offsets_;
  Lines lines_[5];  // of queries, gradients of outputs, outputs, keys, and values
  Source* sources_;
  OwnedRow* owned_rows_;
  float *keys_by_channel_, *values_by_channel_, *keys_;
  float *grad_keys_, *grad_values_;
  float *queries_, *grad_outputs_, *queries_by_channel_, *grad_outputs_by_channel_;
  float *weights_, *grad_scores_;
  int64_t grad_bias_size_;
  float* grad_bias_;
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

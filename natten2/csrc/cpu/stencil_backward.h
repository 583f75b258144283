// Backward of small windows. A sheet visits every query that sees a key of its own, computes their weights and the
// gradients of their scores, and adds those to its own queries', keys', and values' gradients: one owner for each.
#pragma once

#include "stencil_grad_keys.h"

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
        query_offsets_(arena.take<int64_t>(cut.most_queries)),
        output_offsets_(arena.take<int64_t>(cut.most_queries)),
        grad_output_offsets_(arena.take<int64_t>(cut.most_queries)),
        logsumexp_offsets_(arena.take<int64_t>(cut.most_queries)),
        grad_logsumexp_offsets_(arena.take<int64_t>(cut.most_queries)),
        grad_query_offsets_(arena.take<int64_t>(cut.most_queries)),
        key_offsets_(arena.take<int64_t>(cut.most_keys)),
        value_offsets_(arena.take<int64_t>(cut.most_keys)),
        lines_{lines(arena), lines(arena), lines(arena), lines(arena), lines(arena)},
        sources_(arena.take<Source>(sizes_.sources)),
        key_grads_(args, walk_, cut, arena),
        keys_by_channel_(arena.take<float>(walk_.slots.size() * score_head_dim_ * sizes_.pitch)),
        values_by_channel_(arena.take<float>(walk_.slots.size() * score_value_dim_ * sizes_.pitch)),
        keys_(arena.take<float>(walk_.slots.size() * cut.most_keys * key_channels_)),
        queries_by_channel_(arena.take<float>(kRows * score_head_dim_ * kLanes)),
        grad_outputs_by_channel_(arena.take<float>(kRows * score_value_dim_ * kLanes)),
        grad_bias_size_(args.grad_rpb_parts ? sizes_.heads_per_key * most_blocks(cut) * sizes_.block_bias : 0),
        grad_bias_(arena.take<float>(grad_bias_size_)) {}

  void start() { fill_zero(grad_bias_, grad_bias_size_); }

  // Runs `strips` strips that follow each other, several only where there is one plane, and calls `end_strip` when a
  // strip's share of the bias's gradient is summed up.
  template <class EndStrip>
  void run(const Sheet& sheet, int64_t strips, EndStrip&& end_strip) {
    if (walk_.start(sheet)) start_columns();
    const int64_t depth = walk_.depth(), height = walk_.height();
    rows_ = {smaller(height, sheet.strip * cut_.rows), smaller(height, (sheet.strip + strips) * cut_.rows)};
    key_grads_.start(rows_);
    int64_t strip = sheet.strip;
    if (rows_.size() > 0 && walk_.columns.queries() > 0) {
      const Interval queries = visited(Visit::kSeeing, problem_.axes[1], height, rows_);
      for (int64_t p0 = 0; p0 < depth; ++p0) {
        for_each_row_tile(problem_, height, depth, p0, queries, [&](const RowTile& tile) {
          for (; strip + 1 < sheet.strip + strips && tile.p1[0] >= (strip + 1) * cut_.rows; ++strip) end_strip();
          run_tile(tile);
        });
        key_grads_.sum();
      }
      key_grads_.finish();
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
    key_grads_.start_columns();
    lines_[0].template start<Storage>(query_offsets_, columns.queries(), problem_.head_dim);
    lines_[1].template start<Storage>(grad_output_offsets_, columns.queries(), problem_.value_dim);
    lines_[2].template start<Storage>(output_offsets_, columns.queries(), problem_.value_dim);
    lines_[3].template start<Storage>(key_offsets_, columns.keys(), problem_.head_dim);
    lines_[4].template start<Storage>(value_offsets_, columns.keys(), problem_.value_dim);
    walk_.clear_padding(keys_by_channel_, score_head_dim_);
    walk_.clear_padding(values_by_channel_, score_value_dim_);
  }

  void run_tile(const RowTile& tile) {
    walk_.find_key_rows(tile, [&](const SheetWalk::KeyRow& row) { load_key_row(row); });
    for (int64_t s = 0; s < walk_.key_row_count; ++s) {
      const SheetWalk::KeyRow& row = walk_.key_rows[s];
      sources_[s] = {keys_ + row.slot * cut_.most_keys * key_channels_, row.begin, row.end, {}};
      for (int r = 0; r < kRows; ++r) sources_[s].weights[r] = row.scores[r];
    }
    key_grads_.keep(tile);
    if (walk_.is_wide()) return run_wide(tile);
    const int64_t together = key_grads_.blocks_together();
    for (int64_t first = 0; first < walk_.columns.blocks(); first += together) {
      const int64_t count = smaller(together, walk_.columns.blocks() - first);
      for (int64_t i = 0; i < count; ++i) run_block(tile, first + i, i);
      key_grads_.add(first, count);
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
    float *weights = key_grads_.weights(i), *grad_scores = key_grads_.grad_scores(i);
    for (int r = 0; r < tile.count; ++r) load_queries(tile, block, r, key_grads_.tokens(i, r));
    walk_.template score_block<kInPairs<Storage>>(tile, b, keys_by_channel_, queries_by_channel_, score_head_dim_,
                                                  args_.forward.rpb, scale_, weights,
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
    float *weights = key_grads_.weights(0), *all_grad_scores = key_grads_.grad_scores(0);
    for (int64_t b = 0; b < walk_.columns.blocks(); b += rows.count) {
      rows.count = walk_.blocks_together(b);
      for (int r = 0; r < rows.count; ++r)
        load_queries(rows, walk_.columns.block_at(b + r), r, key_grads_.tokens(r, 0));
      walk_.template score_blocks<kInPairs<Storage>>(tile, b, rows.count, keys_by_channel_, queries_by_channel_,
                                                     score_head_dim_, args_.forward.rpb, scale_, weights);
      walk_.template score_blocks<kInPairs<Storage>>(tile, b, rows.count, values_by_channel_, grad_outputs_by_channel_,
                                                     score_value_dim_, false, 1, all_grad_scores);
      Storage* row = row_of<Storage>(args_.grad_query, tile, 0);
      for (int r = 0; r < rows.count; ++r) {
        const Block& block = walk_.columns.block_at(b + r);
        weigh(rows, r, block, weights, all_grad_scores);
        const float* grad_scores = all_grad_scores + r * sizes_.window_scores;
        if (grad_bias_size_ > 0)
          add_row(grad_scores, grad_bias_ + walk_.bias_offset(tile, 0, walk_.key_rows[0], b + r));
        const int64_t* offsets = grad_query_offsets_ + block.first;
        const int32_t* owned = walk_.columns.owned() + block.first;
        sum_wide_queries<Storage>(walk_.columns, block, sources_[0].tokens, grad_scores, problem_.head_dim, scale_,
                                  [&](int64_t column) { return owned[column] ? row + offsets[column] : nullptr; });
      }
      key_grads_.add_wide(b, rows.count);
    }
  }

  // Turns the scores of a query row into weights, and their gradients into those of the scores.
  void weigh(const RowTile& tile, int r, const Block& block, float* all_weights, float* all_grad_scores) {
    const Lanes logsumexp = logsumexp_[r], delta = delta_[r];
    walk_.for_each_piece(tile, r, [&](int64_t first, int64_t vectors) {
      for_each_few(vectors, [&](int64_t i, auto few) NATTEN2_INLINE {
        float *weights = all_weights + first + i * kLanes, *grad_scores = all_grad_scores + first + i * kLanes;
        Lanes weight[few()];
        unrolled<0, few()>([&](auto j) NATTEN2_INLINE { weight[j] = load_lanes(weights + j * kLanes) - logsumexp; });
        exponentiate(weight);
        unrolled<0, few()>([&](auto j) NATTEN2_INLINE {
          store_lanes(weight[j], weights + j * kLanes);
          store_lanes(weight[j] * (load_lanes(grad_scores + j * kLanes) - delta), grad_scores + j * kLanes);
        });
      });
    });
    walk_.hide(tile, r, block, 0, all_grad_scores);
  }

  // Loads a row of queries and what belongs to them, by token and by channel.
  void load_queries(const RowTile& tile, const Block& block, int r, const QueryTokens& tokens) {
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
    load_both(args_.forward.query, query_offsets_, problem_.head_dim, key_channels_, tokens.queries,
              queries_by_channel_ + r * score_head_dim_ * kLanes);
    load_both(args_.grad_output, grad_output_offsets_, problem_.value_dim, value_channels_, tokens.grad_outputs,
              grad_outputs_by_channel_ + r * score_value_dim_ * kLanes);
    key_grads_.scale_queries(tokens.queries, block.count);
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
                   load_lanes(tokens.grad_outputs + i * value_channels_ + channel);
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
    sum_queries<Storage>(
        walk_.columns, block, sources_, walk_.key_row_count, grad_scores, problem_.head_dim, scale_,
        [&](int r, int64_t column) { return rows[r] && owned[column] ? rows[r] + offsets[column] : nullptr; });
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

  const Backward& args_;
  const Problem& problem_;
  const Cut& cut_;
  SheetWalk walk_;
  const Sizes& sizes_;
  const int64_t key_channels_, value_channels_;     // of a token, in whole vectors
  const int64_t score_head_dim_, score_value_dim_;  // what scores run over: channels, or pairs of them
  const float scale_ = static_cast<float>(problem_.scale);
  Interval rows_ = {};  // of the middle axis, that the sheet owns
  Lanes logsumexp_[kRows];
  Lanes delta_[kRows];
  int64_t *query_offsets_, *output_offsets_, *grad_output_offsets_, *logsumexp_offsets_, *grad_logsumexp_offsets_;
  int64_t *grad_query_offsets_, *key_offsets_, *value_offsets_;
  Lines lines_[5];  // of queries, gradients of outputs, outputs, keys, and values
  Source* sources_;
  KeyGradients<Storage> key_grads_;
  float *keys_by_channel_, *values_by_channel_, *keys_;
  float *queries_by_channel_, *grad_outputs_by_channel_;
  int64_t grad_bias_size_;
  float* grad_bias_;
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// Weighted sums of tokens for the query columns of a block, and how columns and channels are visited for them.
#pragma once

#include "stencil_plan.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Visits neighboring columns, and vectors of channels, so that enough sums run side by side, but not more than fit in
// registers: `act(columns, width, column, vector, span)`, the first two as types. Columns without tokens are left out.
template <class TokensOf, class Act>
inline void for_each_sum(int64_t count, int64_t vectors, TokensOf&& tokens_of, Act&& act) {
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
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
  for (; vector + 2 <= vectors; vector += 2) run(std::integral_constant<int, kVectors / 2>(), kTwo, vector);
  for (; vector < vectors; ++vector) run(kTwo, kOne, vector);
}

// The rows of tokens that a sum writes: whole vectors of float32 as they are, others by way of a buffer.
template <class Storage, int kColumns, int kWidth>
class Outputs {
 public:
  // `row_of(column, r)` is where the sums of a column's row go, or null. Of the channels from `channel` on, `count`
  // exist.
  template <class RowOf>
  Outputs(ColumnSums& sums, int64_t channel, int64_t count, RowOf&& row_of)
      : count_(count), is_direct_(std::is_same_v<Storage, float> && count >= kWidth * kLanes) {
    for (int c = 0; c < kColumns; ++c)
      for (int r = 0; r < kRows; ++r) {
        rows_[c][r] = row_of(c, r);
        if (!rows_[c][r]) continue;
        rows_[c][r] += channel;
        sums.out[c][r] = is_direct_ ? reinterpret_cast<float*>(rows_[c][r]) : buffer_[c][r];
      }
  }

  void write() const {
    if (is_direct_) return;
    for (int c = 0; c < kColumns; ++c)
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kWidth && rows_[c][r]; ++i)
          narrow_some(load_lanes(buffer_[c][r] + i * kLanes), rows_[c][r] + i * kLanes, count_ - i * kLanes);
  }

 private:
  int64_t count_;
  bool is_direct_;
  Storage* rows_[kColumns][kRows];
  float buffer_[kColumns][kRows][kWidth * kLanes];
};

// Sums tokens for the query columns of a block: `weights` holds a row of lanes for each token of a window.
// `row_of(r, column)` is where the sums of a column go, or null.
template <class Storage, class RowOf>
inline void sum_queries(const Columns& columns, const Block& block, const Source* sources, int64_t source_count,
                        const float* weights, int64_t channels, float scale, RowOf&& row_of) {
  const int32_t* sizes = columns.sizes() + block.first;
  const int32_t* starts = columns.starts() + block.first;
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  for_each_sum(
      block.count, vectors, [&](int64_t column) { return Interval{starts[column], starts[column] + sizes[column]}; },
      [&](auto columns, auto width, int64_t column, int64_t vector, const Span& span) NATTEN2_INLINE {
        ColumnSums sums = {sources, source_count, vectors * kLanes, vector * kLanes, span, {}, {}};
        Outputs<Storage, columns(), width()> outputs(sums, vector * kLanes, channels - vector * kLanes,
                                                     [&](int c, int r) { return row_of(r, column + c); });
        sum_query_columns<columns(), width()>(sums, weights + column - starts[column] * kLanes,
                                              columns() == 2 ? starts[column + 1] - starts[column] : 0, scale);
        outputs.write();
      });
}

// Visits as many neighboring columns with tokens as there are rows: `act(width, column, count, tokens, vector)`.
template <class TokensOf, class Act>
inline void for_each_wide_sum(int64_t count, int64_t vectors, TokensOf&& tokens_of, Act&& act) {
  for (int64_t column = 0; column < count;) {
    Interval tokens[kRows];
    int found = 0;
    for (; found < kRows && column + found < count; ++found) {
      tokens[found] = tokens_of(column + found);
      if (tokens[found].size() <= 0) break;
    }
    if (found == 0) {
      ++column;
      continue;
    }
    int64_t vector = 0;
    for (; vector + kVectors <= vectors; vector += kVectors)
      act(std::integral_constant<int, kVectors>(), column, found, tokens, vector);
    if constexpr (kVectors == 4)
      for (; vector + 2 <= vectors; vector += 2) act(std::integral_constant<int, 2>(), column, found, tokens, vector);
    for (; vector < vectors; ++vector) act(std::integral_constant<int, 1>(), column, found, tokens, vector);
    column += found;
  }
}

// The same as `sum_queries` for a row of tokens that all columns see most of: four columns at a time.
template <class Storage, class RowOf>
inline void sum_wide_queries(const Columns& columns, const Block& block, const float* tokens, const float* weights,
                             int64_t channels, float scale, RowOf&& row_of) {
  const int32_t* sizes = columns.sizes() + block.first;
  const int32_t* starts = columns.starts() + block.first;
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  for_each_wide_sum(
      block.count, vectors, [&](int64_t column) { return Interval{starts[column], starts[column] + sizes[column]}; },
      [&](auto width, int64_t column, int count, const Interval* parts, int64_t vector) NATTEN2_INLINE {
        Source row = {tokens, 0, 0, {}}, pieces[2 * kRows];
        for (int r = 0; r < count; ++r)
          row.weights[r] = r - (starts[column + r] - starts[column]) * static_cast<int32_t>(kLanes);
        const int piece_count = cut_source(row, parts, count, pieces);
        ColumnSums sums = {pieces, piece_count, vectors * kLanes, vector * kLanes, {}, {}, {}};
        Outputs<Storage, 1, width()> outputs(
            sums, vector * kLanes, channels - vector * kLanes,
            [&](int, int r) -> Storage* { return r < count ? row_of(column + r) : nullptr; });
        const QueryWeights<Constant<0>> first = {weights + column - starts[column] * kLanes, {}};
        sum_columns<kParts, kParts, false, 1, width()>(sums, first, scale);
        outputs.write();
      });
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

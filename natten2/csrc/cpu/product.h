// Products of matrices that fit in the nearest caches, in tiles that fit in registers.
#pragma once

#include <cmath>

#include "traverse.h"
#include "vector.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileBytes = 128;
#elif defined(__AVX__)
constexpr int kTileRows = 4, kTileBytes = 64;
#else
constexpr int kTileRows = 4, kTileBytes = 32;
#endif

// sum[row][column] = sum over depth of left[row][depth] * right[depth][column], or that added to what is there.
template <class Acc>
struct Product {
  int64_t rows, columns, depth;
  const Acc* left;
  int64_t left_row, left_depth;  // elements from one to the next
  const Acc* right;
  int64_t right_depth;
  Acc* sum;
  int64_t sum_row;
  bool add;
};

// Left to itself the compiler fuses in some tiles and not in others, and a query's result would depend on which others
// are computed beside it.
template <class Acc>
inline Acc multiply_add(Acc a, Acc b, Acc c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <int kRows, int kColumns, class Acc>
inline void compute_tile(const Product<Acc>& product, int64_t row, int64_t column) {
  const int64_t left_row = product.left_row, left_depth = product.left_depth, right_depth = product.right_depth;
  const Acc* left = product.left + row * left_row;
  const Acc* right = product.right + column;
  Acc tile[kRows][kColumns] = {};
  for (int64_t k = 0; k < product.depth; ++k, left += left_depth, right += right_depth) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Acc factor = left[r * left_row];
#pragma omp simd
      for (int c = 0; c < kColumns; ++c) tile[r][c] = multiply_add(factor, right[c], tile[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    Acc* sum = product.sum + (row + r) * product.sum_row + column;
    for (int c = 0; c < kColumns; ++c) sum[c] = product.add ? sum[c] + tile[r][c] : tile[r][c];
  }
}

// What is left over at the end is done in tiles of half the size.
template <int kRows, int kColumns, class Acc>
inline void compute_rows(const Product<Acc>& product, int64_t row, int64_t column) {
  for (; row + kRows <= product.rows; row += kRows) compute_tile<kRows, kColumns>(product, row, column);
  if constexpr (kRows > 1)
    if (row < product.rows) compute_rows<kRows / 2, kColumns>(product, row, column);
}

template <int kColumns, class Acc>
inline void compute_columns(const Product<Acc>& product, int64_t column) {
  for (; column + kColumns <= product.columns; column += kColumns)
    compute_rows<kTileRows, kColumns>(product, 0, column);
  if constexpr (kColumns > 1)
    if (column < product.columns) compute_columns<kColumns / 2>(product, column);
}

// Long sums are taken in blocks, as a RowSum's are.
template <class Acc>
void compute(Product<Acc> product) {
  constexpr int64_t kDepth = 128;
  const int64_t depth = product.depth;
  for (int64_t first = 0; first < depth; first += kDepth) {
    product.depth = smaller(kDepth, depth - first);
    compute_columns<kTileBytes / sizeof(Acc)>(product, 0);
    product.left += kDepth * product.left_depth;
    product.right += kDepth * product.right_depth;
    product.add = true;
  }
}

// Consecutive additional tokens of one key head.
struct AdditionalTokens {
  int64_t batch;
  int64_t key_head;
  int64_t first;
  int64_t count;
};

// Writes their keys or values as `[count, channels]`.
template <class Storage, class Acc>
void load_rows(const View& view, const AdditionalTokens& tokens, int64_t channels, Acc* out) {
  for (int64_t n = 0; n < tokens.count; ++n)
    load(at<Storage>(view, Token{tokens.batch, {0, 0, tokens.first + n}}, tokens.key_head), out + n * channels,
         channels);
}

template <class Storage, class Acc>
void store_rows(const View& view, const AdditionalTokens& tokens, int64_t channels, const Acc* rows) {
  for (int64_t n = 0; n < tokens.count; ++n)
    store(rows + n * channels, at<Storage>(view, Token{tokens.batch, {0, 0, tokens.first + n}}, tokens.key_head),
          channels);
}

constexpr int64_t kTransposed = 16;

// Writes them as `[channels, count]`, with room for `[kTransposed, channels]` in `rows`.
template <class Storage, class Acc>
void load_columns(const View& view, const AdditionalTokens& tokens, int64_t channels, Acc* out, Acc* rows) {
  for (int64_t n = 0; n < tokens.count; n += kTransposed) {
    const int64_t count = smaller(kTransposed, tokens.count - n);
    load_rows<Storage>(view, {tokens.batch, tokens.key_head, tokens.first + n, count}, channels, rows);
    for (int64_t d = 0; d < channels; ++d)
      for (int64_t i = 0; i < count; ++i) out[d * tokens.count + n + i] = rows[i * channels + d];
  }
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

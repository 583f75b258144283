// The two inner loops of the stencil. Scores run over channels, with a query in each lane; weighted sums of rows run
// over tokens, with a channel in each lane. Neither computes anything that isn't wanted.
#pragma once

#include "../window.h"
#include "lanes.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Query rows that are done together, and vectors of channels that are summed together: as many as leave their sums in
// registers.
constexpr int kRows = 4;
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

// Keys of a row that up to kRows query rows are scored with together.
constexpr int most_keys(int query_rows) {
#if defined(__AVX512F__)
  constexpr int kMost[kRows] = {8, 8, 7, 7};
#else
  constexpr int kMost[kRows] = {7, 4, 3, 2};
#endif
  return kMost[query_rows - 1];
}

// How the lanes find their keys in a row: one after the other, within two vectors, or anywhere.
enum Fetch { kConsecutive, kPermuted, kScattered, kFetches };

// Scores of one block's queries, of up to kRows rows, with keys of one row: `scale * sum + bias`.
struct Scores {
  const float* keys;  // by channel: the first lane's first key
  int64_t pitch;
  int64_t next;          // from there to the keys that are scored next
  LaneInts index;        // of each lane's first key
  const float* queries;  // by channel: rows `query_row` apart
  int64_t query_row;
  int64_t channels;
  float scale;
  const float* bias[kRows];  // or null
  float* out[kRows];
};

template <int kFetch, int kQueryRows, int kCount>
void score(const Scores& args, int64_t first) {
  Lanes sums[kQueryRows][kCount] = {};
  const float* key = args.keys + first;
  const float* query = args.queries;
  const int64_t pitch = args.pitch, query_row = args.query_row;
  LaneInts index[kCount];
  for (int k = 0; k < kCount; ++k) index[k] = args.index + k;
  for (int64_t channel = 0; channel < args.channels; ++channel, key += pitch, query += kLanes) {
    if constexpr (kFetch != kScattered) {
      __builtin_prefetch(key + args.next);
      __builtin_prefetch(key + args.next + kLanes);
    }
    Lanes queries[kQueryRows];
#pragma GCC unroll 4
    for (int r = 0; r < kQueryRows; ++r) {
      queries[r] = load_lanes(query + r * query_row);
      if constexpr (kCount > 1) hold(queries[r]);
    }
    Lanes low = {}, high = {};
    if constexpr (kFetch == kPermuted) {
      low = load_lanes(key);
      high = load_lanes(key + kLanes);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      Lanes keys;
      if constexpr (kFetch == kConsecutive) {
        keys = load_lanes(key + k);
      } else if constexpr (kFetch == kPermuted) {
        keys = pick(low, high, index[k]);
      } else {
        for (int i = 0; i < kLanes; ++i) keys[i] = key[index[k][i]];
      }
      if constexpr (kQueryRows > 1) hold(keys);
#pragma GCC unroll 4
      for (int r = 0; r < kQueryRows; ++r) sums[r][k] = multiply_add(queries[r], keys, sums[r][k]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kQueryRows; ++r) {
    const float* bias = args.bias[r];
#pragma GCC unroll 8
    for (int k = 0; k < kCount; ++k) {
      const Lanes added = bias ? load_lanes(bias + (first + k) * kLanes) : Lanes{};
      store_lanes(multiply_add(splat(args.scale), sums[r][k], added), args.out[r] + (first + k) * kLanes);
    }
  }
}

template <int kFetch, int kQueryRows, int kCount>
void score_some(const Scores& args, int64_t first, int64_t count) {
  if constexpr (kCount > 1)
    if (count < kCount) return score_some<kFetch, kQueryRows, kCount - 1>(args, first, count);
  score<kFetch, kQueryRows, kCount>(args, first);
}

// Cuts a row of keys into pieces of about the same size, of at most `most`.
template <int kFetch, int kQueryRows>
void score_row(const Scores& args, int64_t keys, int64_t most) {
  most = smaller(most, most_keys(kQueryRows));
  const int64_t pieces = (keys + most - 1) / most;
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t first = keys * p / pieces;
    score_some<kFetch, kQueryRows, most_keys(kQueryRows)>(args, first, keys * (p + 1) / pieces - first);
  }
}

template <int kFetch>
void score_rows(const Scores& args, int rows, int64_t keys, int64_t most) {
  switch (rows) {
    case 1:
      return score_row<kFetch, 1>(args, keys, most);
    case 2:
      return score_row<kFetch, 2>(args, keys, most);
    case 3:
      return score_row<kFetch, 3>(args, keys, most);
    default:
      return score_row<kFetch, 4>(args, keys, most);
  }
}

// Scores `keys` keys of a row, at most `most` at a time.
inline void score_rows(Fetch fetch, const Scores& args, int rows, int64_t keys, int64_t most) {
  if (fetch == kConsecutive) return score_rows<kConsecutive>(args, rows, keys, most);
  if (fetch == kPermuted) return score_rows<kPermuted>(args, rows, keys, most);
  return score_rows<kScattered>(args, rows, keys, most);
}

// A row of tokens that the sums [begin, end) of a tile take part in; sum r weighs its tokens by numbers that begin
// weights[r] after those of the column.
struct Source {
  const float* tokens;  // rows of channels
  int begin, end;
  int32_t weights[kRows];
};

// Columns whose sums are taken together, each over tokens that follow each other in every source.
template <int kColumns>
struct Tokens {
  int64_t first[kColumns];
  int64_t count;
  int64_t pitch;  // from token to token
};

template <int kColumns, int kWidth>
using Sums = Lanes[kColumns][kRows][kWidth];

template <int kBegin, int kEnd, int kColumns, int kWidth, class Weight>
[[gnu::always_inline]] inline void add_source(const Source& source, const float* const (&tokens)[kColumns],
                                              int64_t count, int64_t pitch, const Weight& weight,
                                              Sums<kColumns, kWidth>& sums) {
  int64_t offset = 0;
  for (int64_t t = 0; t < count; ++t, offset += pitch) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      Lanes channels[kWidth];
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) {
        channels[i] = load_lanes(tokens[c] + offset + i * kLanes);
        if constexpr (kEnd - kBegin > 1) hold(channels[i]);
      }
      const float* weights = weight(c, t);
#pragma GCC unroll 4
      for (int r = kBegin; r < kEnd; ++r) {
        const Lanes factor = splat(weights[source.weights[r]]);
#pragma GCC unroll 4
        for (int i = 0; i < kWidth; ++i) sums[c][r][i] = multiply_add(factor, channels[i], sums[c][r][i]);
      }
    }
  }
}

// Adds weighted rows of all sources to sums; `weight(column, t)` points to the weights of a column's token t.
template <int kColumns, int kWidth, class Weight>
[[gnu::always_inline]] inline void add_sources(const Source* sources, int64_t source_count, int64_t channel,
                                               const Tokens<kColumns>& tokens, const Weight& weight,
                                               Sums<kColumns, kWidth>& sums) {
  int64_t first[kColumns];
  for (int c = 0; c < kColumns; ++c) first[c] = tokens.first[c] * tokens.pitch + channel;
  const int64_t count = tokens.count, pitch = tokens.pitch;
  for (const Source* source = sources; source < sources + source_count; ++source) {
    const float* rows[kColumns];
    for (int c = 0; c < kColumns; ++c) rows[c] = source->tokens + first[c];
    switch (source->begin * 8 + source->end) {
      case 1:
        add_source<0, 1, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 2:
        add_source<0, 2, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 3:
        add_source<0, 3, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 4:
        add_source<0, 4, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 8 + 2:
        add_source<1, 2, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 8 + 3:
        add_source<1, 3, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 8 + 4:
        add_source<1, 4, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 16 + 3:
        add_source<2, 3, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 16 + 4:
        add_source<2, 4, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
      case 24 + 4:
        add_source<3, 4, kColumns, kWidth>(*source, rows, count, pitch, weight, sums);
        break;
    }
  }
}

// Visits the sums, with constants for the indices that the registers need: `act(sum, column, row, vector)`.
template <int kColumns, int kWidth, class Act>
[[gnu::always_inline]] inline void for_each_of(Sums<kColumns, kWidth>& sums, Act&& act) {
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) act(sums[c][r][i], c, r, i);
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

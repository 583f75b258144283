// The two inner loops of the stencil. Scores run over channels, with a query in each lane; weighted sums of rows run
// over tokens, with a channel in each lane. Neither computes anything that isn't wanted.
#pragma once

#include "../window.h"
#include "lanes.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Query rows that are done together, and vectors that are summed together for each, of one column or two: as many as
// leave their sums in registers.
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
  constexpr int kMost[kRows] = {8, 6, 4, 3};
#endif
  return kMost[query_rows - 1];
}

// How the lanes find their keys in a row: one after the other, within a vector, within two, or anywhere.
enum Fetch { kConsecutive, kPermuted, kPicked, kScattered };

// Where one instruction picks from two vectors, which are loaded once for all keys, it does within a vector too.
#if defined(__AVX512F__)
constexpr bool kPermutes = false;
#else
constexpr bool kPermutes = true;
#endif

// Channels from one key to that which is fetched meanwhile, into the first cache. Behind the last channel begins the
// next key row.
constexpr int64_t kTurns = 8;

// Lines of memory that are wanted soon, one for each channel that scores run over: they arrive in the meantime.
struct Ahead {
  const char* row;
  const int64_t* lines;  // bytes from there, or null
};

// Scores of one block's queries, of up to kRows rows, with keys of one row: `scale * sum + bias`.
struct Scores {
  const float* keys;  // by channel: the first lane's first key
  int64_t pitch;
  LaneInts index;        // of each lane's first key
  const float* queries;  // by channel: rows `query_row` apart
  int64_t query_row;
  int64_t channels;  // or pairs of them
  float scale;
  Ahead ahead;
  const float* bias[kRows];  // or null
  float* out[kRows];
};

template <bool kPairs>
[[gnu::always_inline]] inline void add_product(Lanes queries, Lanes keys, Lanes& sum) {
  if constexpr (kPairs)
    accumulate_pairs(queries, keys, sum);
  else
    accumulate(queries, keys, sum);
}

template <int kQueryRows, int kCount>
#if defined(__AVX512F__)
constexpr bool kHoldsKeys = false;
#else
constexpr bool kHoldsKeys = kCount <= kQueryRows;
#endif

template <bool kPairs, int kFetch, int kQueryRows, int kCount>
void score(const Scores& args, int64_t first) {
  Lanes sums[kQueryRows][kCount];
  unrolled<0, kQueryRows>(
      [&](auto r) NATTEN2_INLINE { unrolled<0, kCount>([&](auto k) NATTEN2_INLINE { sums[r][k] = Lanes{}; }); });
  const float* key = args.keys + first;
  const float* query = args.queries;
  const int64_t pitch = args.pitch, query_row = args.query_row;
  const int64_t* lines = first == 0 ? args.ahead.lines : nullptr;
  LaneInts index[kCount];
  unrolled<0, kCount>([&](auto k) NATTEN2_INLINE { index[k] = args.index + k(); });
  for (int64_t channel = 0; channel < args.channels; ++channel, key += pitch, query += kLanes) {
    if constexpr (kFetch != kScattered) {
      __builtin_prefetch(key + kTurns * pitch + kCount - 1);
      __builtin_prefetch(key + kTurns * pitch + kCount - 1 + kLanes);
    }
    if (lines) __builtin_prefetch(args.ahead.row + lines[channel], 0, 2);
    Lanes low = {}, high = {};
    if constexpr (kFetch == kPicked) {
      low = load_lanes(key);
      high = load_lanes(key + kLanes);
    }
    const auto key_at = [&](auto k) NATTEN2_INLINE {
      if constexpr (kFetch == kConsecutive) return load_lanes(key + k());
      if constexpr (kFetch == kPermuted) return permute(load_lanes(key + k()), args.index);
      if constexpr (kFetch == kPicked) return pick(low, high, index[k]);
      Lanes keys;
      for (int i = 0; i < kLanes; ++i) keys[i] = key[index[k][i]];
      return keys;
    };
    const auto query_at = [&](auto r) NATTEN2_INLINE { return load_lanes(query + r() * query_row); };
    // What there is less of stays in registers.
    if constexpr (kHoldsKeys<kQueryRows, kCount>) {
      Lanes keys[kCount];
      unrolled<0, kCount>([&](auto k) NATTEN2_INLINE { keys[k] = held(key_at(k)); });
      unrolled<0, kQueryRows>([&](auto r) NATTEN2_INLINE {
        const Lanes queries = kCount > 1 ? held(query_at(r)) : query_at(r);
        unrolled<0, kCount>([&](auto k) NATTEN2_INLINE { add_product<kPairs>(queries, keys[k], sums[r][k]); });
      });
    } else {
      Lanes queries[kQueryRows];
      unrolled<0, kQueryRows>([&](auto r) NATTEN2_INLINE { queries[r] = held(query_at(r)); });
      unrolled<0, kCount>([&](auto k) NATTEN2_INLINE {
        const Lanes keys = kQueryRows > 1 ? held(key_at(k)) : key_at(k);
        unrolled<0, kQueryRows>([&](auto r) NATTEN2_INLINE { add_product<kPairs>(queries[r], keys, sums[r][k]); });
      });
    }
  }
  unrolled<0, kQueryRows>([&](auto r) NATTEN2_INLINE {
    const float* bias = args.bias[r];
    unrolled<0, kCount>([&](auto k) NATTEN2_INLINE {
      const Lanes added = bias ? load_lanes(bias + (first + k) * kLanes) : Lanes{};
      store_lanes(multiply_add(splat(args.scale), sums[r][k], added), args.out[r] + (first + k) * kLanes);
    });
  });
}

template <bool kPairs, int kFetch, int kQueryRows, int kCount>
void score_some(const Scores& args, int64_t first, int64_t count) {
  if constexpr (kCount > 1)
    if (count < kCount) return score_some<kPairs, kFetch, kQueryRows, kCount - 1>(args, first, count);
  score<kPairs, kFetch, kQueryRows, kCount>(args, first);
}

// Cuts a row of keys into pieces of about the same size, of at most `most`.
template <bool kPairs, int kFetch, int kQueryRows>
void score_row(const Scores& args, int64_t keys, int64_t most) {
  most = smaller(most, most_keys(kQueryRows));
  // Without a division, which takes as long as the scores.
  if (keys <= most) return score_some<kPairs, kFetch, kQueryRows, most_keys(kQueryRows)>(args, 0, keys);
  const int64_t pieces = (keys + most - 1) / most;
  for (int64_t p = 0; p < pieces; ++p) {
    const int64_t first = keys * p / pieces;
    score_some<kPairs, kFetch, kQueryRows, most_keys(kQueryRows)>(args, first, keys * (p + 1) / pieces - first);
  }
}

template <bool kPairs, int kFetch>
void score_rows(const Scores& args, int rows, int64_t keys, int64_t most) {
  switch (rows) {
    case 1:
      return score_row<kPairs, kFetch, 1>(args, keys, most);
    case 2:
      return score_row<kPairs, kFetch, 2>(args, keys, most);
    case 3:
      return score_row<kPairs, kFetch, 3>(args, keys, most);
    default:
      return score_row<kPairs, kFetch, 4>(args, keys, most);
  }
}

// Scores `keys` keys of a row, at most `most` at a time.
template <bool kPairs>
inline void score_rows(Fetch fetch, const Scores& args, int rows, int64_t keys, int64_t most) {
  if (fetch == kConsecutive) return score_rows<kPairs, kConsecutive>(args, rows, keys, most);
  if constexpr (kPermutes)
    if (fetch == kPermuted) return score_rows<kPairs, kPermuted>(args, rows, keys, most);
  if (fetch == kPicked) return score_rows<kPairs, kPicked>(args, rows, keys, most);
  return score_rows<kPairs, kScattered>(args, rows, keys, most);
}

// A row of tokens that the sums [begin, end) of a tile take part in; sum r weighs its tokens by numbers that begin
// weights[r] after those of the column.
struct Source {
  const float* tokens;  // rows of channels
  int begin, end;
  int32_t weights[kRows];
  Interval part = {};  // of the tokens, where the sums are those of neighboring columns
};

// Tokens of a row that one column's sums run over, or two neighbors': of the first alone, of both, of the second alone.
struct Span {
  Interval first, both, second;
};

inline Span span(Interval tokens) { return {tokens, {}, {}}; }

// From a column to the next, neither the first token nor the last ever moves back.
inline Span span(Interval first, Interval second) {
  if (second.begin >= first.end) return {first, {}, second};
  return {{first.begin, second.begin}, {second.begin, first.end}, {first.end, second.end}};
}

template <int64_t kNumber>
using Constant = std::integral_constant<int64_t, kNumber>;

// Where query columns find the weights of a token: in a row of lanes.
template <class Next>
struct QueryWeights {
  const float* first;  // of token 0
  Next next;           // from a column to its neighbor
  int64_t index(int64_t token) const { return token * kLanes; }
  auto column(Constant<0>) const { return Constant<0>(); }
  auto column(Constant<1>) const { return next; }
};

// Where key columns find those of the lanes that see them.
struct KeyWeights {
  const float* first;
  const int32_t* offsets;  // of each lane
  int64_t index(int64_t token) const { return offsets[token]; }
  template <int64_t kColumn>
  auto column(Constant<kColumn>) const {
    return Constant<kColumn * kLanes>();
  }
};

// Sums of one or two columns, and where they go.
struct ColumnSums {
  const Source* sources;
  int64_t source_count;
  int64_t pitch;  // from token to token
  int64_t channel;
  Span span;
  float* out[2][kRows];  // or null
  bool is_begun[kRows];  // whether there is something to add to
};

// Neighboring columns as the sums of one: cuts the row that they run over wherever a column begins or ends. Returns the
// number of pieces, at most 2 * count.
inline int cut_source(const Source& row, const Interval* tokens, int count, Source* pieces) {
  int found = 0, begin = 0;
  for (int64_t t = 0;;) {
    while (begin < count && tokens[begin].end <= t) ++begin;
    if (begin == count) return found;
    t = larger(t, tokens[begin].begin);
    int end = begin + 1;
    while (end < count && tokens[end].begin <= t) ++end;
    const int64_t next = end < count ? smaller(tokens[begin].end, tokens[end].begin) : tokens[begin].end;
    pieces[found] = row;
    pieces[found].begin = begin;
    pieces[found].end = end;
    pieces[found++].part = {t, next};
    t = next;
  }
}

template <int kColumns, int kWidth>
using Sums = Lanes[kColumns][kRows][kWidth];

// Adds tokens to the sums [kBegin, kEnd) of the columns [kFirst, kLast): kCount of them, or all where that is -1.
template <int kBegin, int kEnd, int kFirst, int kLast, int kCount, int kColumns, int kWidth, class Weights>
[[gnu::always_inline]] inline void add_tokens(const Source& source, Interval tokens, const ColumnSums& args,
                                              const Weights& weights, Sums<kColumns, kWidth>& sums) {
  const float* rows[kRows];
  unrolled<kBegin, kEnd>([&](auto r) NATTEN2_INLINE { rows[r] = weights.first + source.weights[r]; });
  const float* token = source.tokens + tokens.begin * args.pitch + args.channel;
  const auto add = [&](int64_t t) NATTEN2_INLINE {
    Lanes channels[kWidth];
    unrolled<0, kWidth>([&](auto i) NATTEN2_INLINE {
      channels[i] = load_lanes(token + i * kLanes);
      if constexpr ((kEnd - kBegin) * (kLast - kFirst) > 1) channels[i] = held(channels[i]);
    });
    token += args.pitch;
    const int64_t index = weights.index(t);
    unrolled<kFirst, kLast>([&](auto c) NATTEN2_INLINE {
      unrolled<kBegin, kEnd>([&](auto r) NATTEN2_INLINE {
        const Lanes factor = splat(rows[r][index + weights.column(Constant<c()>())]);
        unrolled<0, kWidth>([&](auto i) NATTEN2_INLINE { accumulate(factor, channels[i], sums[c][r][i]); });
      });
    });
  };
  if constexpr (kCount >= 0) {
    unrolled<0, kCount>([&](auto t) NATTEN2_INLINE { add(tokens.begin + t); });
  } else {
    for (int64_t t = tokens.begin; t < tokens.end; ++t) add(t);
  }
}

// In place of a number of tokens: each source has its own.
constexpr int kParts = -2;

template <int kBegin, int kEnd, int kAlone, int kBoth, int kColumns, int kWidth, class Weights>
[[gnu::always_inline]] inline void add_source(const Source& source, const ColumnSums& args, const Weights& weights,
                                              Sums<kColumns, kWidth>& sums) {
  const Span& span = args.span;
  if constexpr (kBoth == kParts) {
    add_tokens<kBegin, kEnd, 0, 1, -1>(source, source.part, args, weights, sums);
  } else if constexpr (kColumns == 1) {
    add_tokens<kBegin, kEnd, 0, 1, kBoth>(source, span.first, args, weights, sums);
  } else {
    add_tokens<kBegin, kEnd, 0, 1, kAlone>(source, span.first, args, weights, sums);
    add_tokens<kBegin, kEnd, 0, 2, kBoth>(source, span.both, args, weights, sums);
    add_tokens<kBegin, kEnd, 1, 2, kAlone>(source, span.second, args, weights, sums);
  }
}

// Sums over all sources, where each column has kAlone tokens of its own, and kBoth with its neighbor; -1 is any number.
template <int kAlone, int kBoth, bool kOnto, int kColumns, int kWidth, class Weights>
[[gnu::noinline]] void sum_columns(const ColumnSums& args, const Weights& weights, float scale) {
  Sums<kColumns, kWidth> sums;
  const auto for_each = [&](auto&& act) NATTEN2_INLINE {
    unrolled<0, kColumns>([&](auto c) NATTEN2_INLINE {
      unrolled<0, kRows>([&](auto r) NATTEN2_INLINE {
        if (args.out[c][r])
          unrolled<0, kWidth>([&](auto i) NATTEN2_INLINE { act(sums[c][r][i], args.out[c][r] + i * kLanes); });
      });
    });
  };
  unrolled<0, kColumns>([&](auto c) NATTEN2_INLINE {
    unrolled<0, kRows>(
        [&](auto r) NATTEN2_INLINE { unrolled<0, kWidth>([&](auto i) NATTEN2_INLINE { sums[c][r][i] = Lanes{}; }); });
  });
  if constexpr (kOnto) {
    unrolled<0, kRows>([&](auto r) NATTEN2_INLINE {
      if (args.is_begun[r])
        unrolled<0, kColumns>([&](auto c) NATTEN2_INLINE {
          unrolled<0, kWidth>([&](auto i) NATTEN2_INLINE { sums[c][r][i] = load_lanes(args.out[c][r] + i * kLanes); });
        });
    });
  }
  for (const Source* source = args.sources; source < args.sources + args.source_count; ++source) {
    switch (source->begin * 8 + source->end) {
      case 1:
        add_source<0, 1, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 2:
        add_source<0, 2, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 3:
        add_source<0, 3, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 4:
        add_source<0, 4, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 10:
        add_source<1, 2, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 11:
        add_source<1, 3, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 12:
        add_source<1, 4, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 19:
        add_source<2, 3, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 20:
        add_source<2, 4, kAlone, kBoth>(*source, args, weights, sums);
        break;
      case 28:
        add_source<3, 4, kAlone, kBoth>(*source, args, weights, sums);
        break;
    }
  }
  if constexpr (kOnto)
    for_each([](Lanes sum, float* out) NATTEN2_INLINE { store_lanes(sum, out); });
  else
    for_each([&](Lanes sum, float* out) NATTEN2_INLINE { store_lanes(splat(scale) * sum, out); });
}

#ifdef __SANITIZE_ADDRESS__
// The compiler takes many minutes over unrolled loops that are watched.
constexpr bool kUnrolls = false;
#else
constexpr bool kUnrolls = true;
#endif

// The same, with loops unrolled for the most common windows.
template <bool kOnto, int kAlone, int kShared, int kColumns, int kWidth, class Weights>
[[gnu::always_inline]] inline void sum_unrolled(const ColumnSums& args, const Weights& weights, float scale) {
  constexpr bool kIsWide = kColumns * kWidth == kVectors;
  const Span& span = args.span;
  if constexpr (kUnrolls && kIsWide && kShared > 0) {
    const bool is_even = kColumns == 1 || (span.first.size() == kAlone && span.second.size() == kAlone);
    const int64_t shared = kColumns == 1 ? span.first.size() : span.both.size();
    if (is_even && shared == kShared)
      return sum_columns<kAlone, kShared, kOnto, kColumns, kWidth>(args, weights, scale);
    if (is_even && shared == kShared - 2)
      return sum_columns<kAlone, kShared - 2, kOnto, kColumns, kWidth>(args, weights, scale);
    if (is_even && shared == kShared - 4)
      return sum_columns<kAlone, kShared - 4, kOnto, kColumns, kWidth>(args, weights, scale);
  }
  sum_columns<-1, -1, kOnto, kColumns, kWidth>(args, weights, scale);
}

// Sums of query columns, `next` first tokens apart, from where the first column has the weight of token 0.
template <int kColumns, int kWidth>
inline void sum_query_columns(const ColumnSums& args, const float* first, int64_t next, float scale) {
  if constexpr (kColumns == 1) {
    sum_unrolled<false, 0, 7, 1, kWidth>(args, QueryWeights<Constant<0>>{first, {}}, scale);
  } else if (next == 1) {
    sum_unrolled<false, 1, 6, 2, kWidth>(args, QueryWeights<Constant<1 - kLanes>>{first, {}}, scale);
  } else if (next == 0) {
    sum_unrolled<false, 0, 7, 2, kWidth>(args, QueryWeights<Constant<1>>{first, {}}, scale);
  } else {
    sum_unrolled<false, 0, 0, 2, kWidth>(args, QueryWeights<int64_t>{first, 1 - next * kLanes}, scale);
  }
}

// Adds to sums of key columns.
template <int kColumns, int kWidth>
inline void sum_key_columns(const ColumnSums& args, const KeyWeights& weights) {
  sum_unrolled<true, 1, kColumns == 1 ? 7 : 6, kColumns, kWidth>(args, weights, 1);
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// Tokens in the layouts that the stencil's inner loops want.
#pragma once

#include "lanes.h"

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

// The same with two channels in each lane, as they are stored; beside an odd channel stands zero.
template <class Storage>
inline void load_pairs(const Storage* base, const int64_t* offsets, int64_t count, int64_t channels, float* out,
                       int64_t pitch) {
  constexpr int64_t kChannels = 2 * kLanes;
  for (int64_t first = 0; first < count; first += kLanes, out += kLanes) {
    for (int64_t channel = 0; channel < channels; channel += kChannels) {
      const int64_t some = smaller(kChannels, channels - channel);
      Lanes rows[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const Storage* token = base + offsets[smaller(first + i, count - 1)] + channel;
        rows[i] = Lanes{};
        if (some == kChannels)
          std::memcpy(&rows[i], token, sizeof rows[i]);
        else
          std::memcpy(&rows[i], token, some * sizeof *token);
      }
      transpose(rows);
      for (int64_t i = 0; i < (some + 1) / 2; ++i) store_lanes(rows[i], out + (channel / 2 + i) * pitch);
    }
  }
}

// Writes what scores run over.
template <class Storage>
inline void load_scored(const Storage* base, const int64_t* offsets, int64_t count, int64_t channels, float* out,
                        int64_t pitch) {
  if constexpr (kInPairs<Storage>)
    load_pairs(base, offsets, count, channels, out, pitch);
  else
    load_by_channel(base, offsets, count, channels, out, pitch);
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

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

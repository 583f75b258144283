// One token at a time, without tiles. A product of tiles multiplies hidden pairs by a weight of 0, and 0 times infinity
// or NaN is NaN. So a block whose result holds a NaN computes it again from partners where what isn't finite is 0,
// which changes no bit for tokens that see none of it; the others come from here, where nothing hidden is touched.
#pragma once

#include "pipeline.cuh"

namespace natten2::cuda {

// A row of channels, spread over the lanes of a warp.
template <class Number, int kChannels>
struct Spread {
  static constexpr int kParts = kChannels / kLanes;

  float part[kParts];

  NATTEN2_DEVICE void load(const View& view, int64_t offset, int channels) {
    const auto* row = static_cast<const typename Number::Storage*>(view.data) + offset;
    NATTEN2_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int channel = static_cast<int>(lane_index()) + i * kLanes;
      part[i] = channel < channels ? Number::widen(row[channel]) : 0.0f;
    }
  }

  // Writes channels from `first` to `end`.
  NATTEN2_DEVICE void store(const View& view, int64_t offset, int first, int end, float factor) const {
    auto* row = static_cast<typename Number::Storage*>(view.data) + offset;
    NATTEN2_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int channel = static_cast<int>(lane_index()) + i * kLanes;
      if (first <= channel && channel < end) row[channel] = Number::narrow(part[i] * factor);
    }
  }

  NATTEN2_DEVICE float dot(const Spread& other) const {
    float sum = 0.0f;
    NATTEN2_UNROLL
    for (int i = 0; i < kParts; ++i) sum += part[i] * other.part[i];
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  NATTEN2_DEVICE void fill(float number) {
    NATTEN2_UNROLL
    for (int i = 0; i < kParts; ++i) part[i] = number;
  }

  NATTEN2_DEVICE void add(const Spread& other, float factor) {
    NATTEN2_UNROLL
    for (int i = 0; i < kParts; ++i) part[i] += factor * other.part[i];
  }

  NATTEN2_DEVICE void multiply(float factor) {
    NATTEN2_UNROLL
    for (int i = 0; i < kParts; ++i) part[i] *= factor;
  }

  // Of this lane's part.
  NATTEN2_DEVICE bool is_finite() const {
    bool result = true;
    NATTEN2_UNROLL
    for (int i = 0; i < kParts; ++i) result &= (to_bits(part[i]) & 0x7f800000u) != 0x7f800000u;
    return result;
  }
};

// Calls `visit` with the position of each partner of a token.
template <class Visit>
NATTEN2_DEVICE void for_each_partner(const Token& token, const Visit& visit) {
  int at[kAxes];
  for (at[0] = token.begin[0]; at[0] < token.end[0]; ++at[0])
    for (at[1] = token.begin[1]; at[1] < token.end[1]; ++at[1])
      for (at[2] = token.begin[2]; at[2] < token.end[2]; ++at[2]) visit(at);
}

// Index of a pair's bias.
NATTEN2_DEVICE uint32_t exact_bias_offset(const Problem& problem, const int (&query)[kAxes], const int (&key)[kAxes]) {
  uint32_t strides[kAxes], offset = 0;
  find_bias_strides(problem, strides);
  NATTEN2_UNROLL
  for (int axis = 0; axis < kAxes; ++axis)
    offset += static_cast<uint32_t>(key[axis] - query[axis] + problem.axes[axis].kernel_size - 1) * strides[axis];
  return offset;
}

}  // namespace natten2::cuda

// The dtypes: how they lie in shared memory, and how tensor cores multiply them.
//
// Rows of channels lie in shared memory in pieces of 16 bytes, whose order changes from row to row so that rows which
// are read together lie in different banks. Products take 16 owned rows from the left and 16 partners, gathered from
// anywhere, from the right:
//
//   scores      [16 owned, 16 partners] += left rows @ partners^T
//   sums        [16 owned, channels]    += weights [16, 16] @ partners
//
// Scores come as two fragments of 8 partners each: `score[j][i]` is of owned row lane / 4 + 8 * (i / 2) and partner
// 8 * j + 2 * (lane % 4) + i % 2. Sums come in the same way, with channels in place of partners.
#pragma once

#include "device.cuh"

namespace natten2::cuda {

constexpr int kPieceBytes = 16;
constexpr int kRows = 16;  // of a warp

// Where a row begins; another piece is at the exclusive or with 16 times its number.
template <int kRowBytes>
NATTEN2_DEVICE uint32_t row_offset(uint32_t row) {
  static_assert(kRowBytes >= 4 * kPieceBytes);
  return row * kRowBytes + (kRowBytes == 4 * kPieceBytes ? row >> 1 & 3 : row & 7) * kPieceBytes;
}

template <int kRowBytes>
NATTEN2_DEVICE unsigned char* piece_of(unsigned char* rows, uint32_t row, uint32_t piece) {
  return rows + (row_offset<kRowBytes>(row) ^ piece * kPieceBytes);
}

// What half precision shares: Type names the 16-bit instructions.
template <class Type>
struct HalfPrecision {
  using Storage = uint16_t;
  static constexpr int kBytes = 2;
  static constexpr int kPerWord = 2;
  static constexpr int kDepth = 16;  // channels of one product

  // Where this lane finds the rows of 16 partners, whose channels are summed in scores, and who are summed in sums.
  // Both orders of matrices put what one instruction takes into neighboring registers.
  struct Partners {
    uint32_t scored, summed;
  };

  NATTEN2_DEVICE static Partners find_partners(const uint16_t* offsets) {
    const uint32_t lane = lane_index();
    return {offsets[lane % 8 + lane / 16 * 8] ^ lane / 8 % 2 * kPieceBytes,
            offsets[lane % 16] ^ lane / 16 * kPieceBytes};
  }

  // What is added to scores at the end.
  struct Rest {};
  NATTEN2_DEVICE static void start(Rest&) {}
  NATTEN2_DEVICE static void add_rest(float (&)[2][4], const Rest&) {}

  template <int kRowBytes>
  NATTEN2_DEVICE static void load_left(uint32_t (&left)[4], unsigned char* rows, int step) {
    load_matrices(left, piece_of<kRowBytes>(rows, lane_index() % 16, 2 * step + lane_index() / 16));
  }

  template <int kRowBytes>
  NATTEN2_DEVICE static void add_scores(float (&score)[2][4], Rest&, const uint32_t (&left)[4], unsigned char* rows,
                                        const Partners& partners, int step, bool) {
    uint32_t right[4];
    load_matrices(right, rows + (partners.scored ^ 2 * step * kPieceBytes));
    Type::multiply(score[0], left, right[0], right[1]);
    Type::multiply(score[1], left, right[2], right[3]);
  }

  // Weights as left operands: rounded, and what rounding took away.
  struct Weights {
    uint32_t rounded[4];
    uint32_t rest[4];
  };

  NATTEN2_DEVICE static Weights make_weights(const float (&weight)[2][4], bool is_exact) {
    Weights result;
    NATTEN2_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float first = weight[i / 2][2 * (i % 2)], second = weight[i / 2][2 * (i % 2) + 1];
      const uint32_t word = Type::pack(first, second);
      result.rounded[i] = word;
      result.rest[i] = is_exact ? Type::pack(first - Type::widen(static_cast<uint16_t>(word)),
                                             second - Type::widen(static_cast<uint16_t>(word >> 16)))
                                : 0;
    }
    return result;
  }

  template <int kRowBytes, int kColumns>
  NATTEN2_DEVICE static void add_sums(float (&sum)[kColumns / 8][4], const Weights& weights, unsigned char* rows,
                                      const Partners& partners, int first, bool is_exact) {
    NATTEN2_UNROLL
    for (int j = 0; j < kColumns / 16; ++j) {
      uint32_t right[4];
      load_transposed_matrices(right, rows + (partners.summed ^ (first / 8 + 2 * j) * kPieceBytes));
      if (is_exact) {
        Type::multiply(sum[2 * j], weights.rest, right[0], right[1]);
        Type::multiply(sum[2 * j + 1], weights.rest, right[2], right[3]);
      }
      Type::multiply(sum[2 * j], weights.rounded, right[0], right[1]);
      Type::multiply(sum[2 * j + 1], weights.rounded, right[2], right[3]);
    }
  }

  NATTEN2_DEVICE static float widen(Storage bits) { return Type::widen(bits); }
  NATTEN2_DEVICE static float widen(uint32_t word, int i) { return Type::widen(static_cast<uint16_t>(word >> 16 * i)); }
  NATTEN2_DEVICE static Storage narrow(float number) { return static_cast<Storage>(Type::pack(number, 0.0f)); }

  NATTEN2_DEVICE static void store_pair(unsigned char* where, float first, float second) {
    *reinterpret_cast<uint32_t*>(where) = Type::pack(first, second);
  }

  // A word with 0 for what isn't finite.
  NATTEN2_DEVICE static uint32_t keep_finite(uint32_t word) {
    if ((word & Type::kExponent) == Type::kExponent) word &= 0xffff0000u;
    if ((word >> 16 & Type::kExponent) == Type::kExponent) word &= 0x0000ffffu;
    return word;
  }
};

struct Half : HalfPrecision<Half> {
  using HalfPrecision::widen;
  static constexpr uint32_t kExponent = 0x7c00;
  NATTEN2_DEVICE static uint32_t pack(float first, float second) { return pack_half(first, second); }
  NATTEN2_DEVICE static float widen(uint16_t bits) { return widen_half(bits); }
  NATTEN2_DEVICE static void multiply(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
    multiply_half(sum, left, right0, right1);
  }
};

struct BFloat16 : HalfPrecision<BFloat16> {
  using HalfPrecision::widen;
  static constexpr uint32_t kExponent = 0x7f80;
  NATTEN2_DEVICE static uint32_t pack(float first, float second) { return pack_bfloat16(first, second); }
  NATTEN2_DEVICE static float widen(uint16_t bits) { return widen_bfloat16(bits); }
  NATTEN2_DEVICE static void multiply(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
    multiply_bfloat16(sum, left, right0, right1);
  }
};

// float32 on tensor cores that multiply TF32: in one product, or, exactly, in three of each number's two parts.
struct Float {
  using Storage = float;
  static constexpr int kBytes = 4;
  static constexpr int kPerWord = 1;
  static constexpr int kDepth = 8;

  struct Partners {
    uint32_t scored[2];  // partners lane / 4 and lane / 4 + 8
    uint32_t summed[4];  // partners 2 * (lane % 4), the next one, and 8 further on
  };

  NATTEN2_DEVICE static Partners find_partners(const uint16_t* offsets) {
    const uint32_t g = lane_index() / 4, t = 2 * (lane_index() % 4);
    return {{offsets[g], offsets[g + 8]}, {offsets[t], offsets[t + 1], offsets[t + 8], offsets[t + 9]}};
  }

  NATTEN2_DEVICE static float load(const unsigned char* rows, uint32_t offset, uint32_t channel) {
    return reinterpret_cast<const float*>(rows + (offset ^ channel / 4 * kPieceBytes))[channel % 4];
  }

  template <int kRowBytes>
  NATTEN2_DEVICE static void load_left(uint32_t (&left)[4], unsigned char* rows, int step) {
    const uint32_t g = lane_index() / 4, channel = 8 * step + lane_index() % 4;
    const uint32_t lower = row_offset<kRowBytes>(g), upper = row_offset<kRowBytes>(g + 8);
    left[0] = to_bits(load(rows, lower, channel));
    left[1] = to_bits(load(rows, upper, channel));
    left[2] = to_bits(load(rows, lower, channel + 4));
    left[3] = to_bits(load(rows, upper, channel + 4));
  }

  // The two smaller products, which would make NaN of an infinite one, stay apart until the end.
  struct Rest {
    float score[2][4];
  };

  NATTEN2_DEVICE static void start(Rest& rest) {
    NATTEN2_UNROLL
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) rest.score[j][i] = 0.0f;
  }

  NATTEN2_DEVICE static void add_rest(float (&score)[2][4], const Rest& rest) {
    NATTEN2_UNROLL
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i)
        if ((to_bits(score[j][i]) & 0x7f800000u) != 0x7f800000u) score[j][i] += rest.score[j][i];
  }

  NATTEN2_DEVICE static void multiply(float (&sum)[4], float (&rest_sum)[4], const uint32_t (&left)[4], float right0,
                                      float right1, bool is_exact) {
    uint32_t rounded[4];
    NATTEN2_UNROLL
    for (int i = 0; i < 4; ++i) rounded[i] = round_to_tf32(from_bits(left[i]));
    const uint32_t first = round_to_tf32(right0), second = round_to_tf32(right1);
    if (is_exact) {
      uint32_t rest[4];
      NATTEN2_UNROLL
      for (int i = 0; i < 4; ++i) rest[i] = round_to_tf32(from_bits(left[i]) - from_bits(rounded[i]));
      multiply_tf32(rest_sum, rest, first, second);
      multiply_tf32(rest_sum, rounded, round_to_tf32(right0 - from_bits(first)),
                    round_to_tf32(right1 - from_bits(second)));
    }
    multiply_tf32(sum, rounded, first, second);
  }

  template <int kRowBytes>
  NATTEN2_DEVICE static void add_scores(float (&score)[2][4], Rest& rest, const uint32_t (&left)[4],
                                        unsigned char* rows, const Partners& partners, int step, bool is_exact) {
    const uint32_t channel = 8 * step + lane_index() % 4;
    NATTEN2_UNROLL
    for (int j = 0; j < 2; ++j)
      multiply(score[j], rest.score[j], left, load(rows, partners.scored[j], channel),
               load(rows, partners.scored[j], channel + 4), is_exact);
  }

  // A sum may take its terms in any order, so that partners 2 * t and 2 * t + 1 stand where t and t + 4 belong.
  struct Weights {
    uint32_t left[2][4];
  };

  NATTEN2_DEVICE static Weights make_weights(const float (&weight)[2][4], bool) {
    Weights result;
    NATTEN2_UNROLL
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 4; ++i) result.left[j][i] = to_bits(weight[j][2 * (i % 2) + i / 2]);
    return result;
  }

  template <int kRowBytes, int kColumns>
  NATTEN2_DEVICE static void add_sums(float (&sum)[kColumns / 8][4], const Weights& weights, unsigned char* rows,
                                      const Partners& partners, int first, bool is_exact) {
    NATTEN2_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const uint32_t channel = first + 8 * n + lane_index() / 4;
      NATTEN2_UNROLL
      for (int j = 0; j < 2; ++j)
        multiply(sum[n], sum[n], weights.left[j], load(rows, partners.summed[2 * j], channel),
                 load(rows, partners.summed[2 * j + 1], channel), is_exact);
    }
  }

  NATTEN2_DEVICE static float widen(Storage number) { return number; }
  NATTEN2_DEVICE static float widen(uint32_t word, int) { return from_bits(word); }
  NATTEN2_DEVICE static Storage narrow(float number) { return number; }

  NATTEN2_DEVICE static void store_pair(unsigned char* where, float first, float second) {
    reinterpret_cast<float*>(where)[0] = first;
    reinterpret_cast<float*>(where)[1] = second;
  }

  NATTEN2_DEVICE static uint32_t keep_finite(uint32_t word) { return (word & 0x7f800000u) == 0x7f800000u ? 0 : word; }
};

}  // namespace natten2::cuda

// Storage types and the accumulation type each is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "../isa.h"

namespace natten2::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

inline namespace NATTEN2_ISA {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Storage>
struct Accumulate {
  using Type = float;
};
template <>
struct Accumulate<double> {
  using Type = double;
};
template <class Storage>
using AccumulateType = typename Accumulate<Storage>::Type;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Free of branches, so that loops over it vectorise on every instruction set.
inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Moves the exponent's bias from 15 to 127; the multiplication by 2^-112 keeps infinity and NaN in their class.
  const float normal = bit_cast<float>((magnitude << 13) + (224u << 23)) * bit_cast<float>(15u << 23);
  // A subnormal half is a multiple of 2^-24: written into the mantissa of 0.5, it counts just that.
  const float subnormal = bit_cast<float>(magnitude | (126u << 23)) - 0.5f;
  const float value = magnitude < 0x400u ? subnormal : normal;
  return bit_cast<float>(sign | bit_cast<uint32_t>(value));
}

template <class Storage>
Storage narrow(AccumulateType<Storage> x);

template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(double x) {
  return x;
}

// Both round to nearest, ties to even.
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Half narrow<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a half counts in steps of 2^-24, as a float does between 0.5 and 1.
    const float counted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(counted) - (126u << 23)))};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

// Whole vectors of float32, one lane for each of several queries or channels.
#pragma once

#include "vector.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

constexpr int kLanes = kVectorBytes / sizeof(float);
#if defined(__AVX512F__)
// A mask that changes nothing keeps GCC from warning of what its own headers leave uninitialized.
constexpr uint16_t kAllLanes = 0xffff;
#endif

using Lanes [[gnu::vector_size(kLanes * sizeof(float))]] = float;
using LaneInts [[gnu::vector_size(kLanes * sizeof(int32_t))]] = int32_t;
using LaneBits [[gnu::vector_size(kLanes * sizeof(uint32_t))]] = uint32_t;
using LaneShorts [[gnu::vector_size(kLanes * sizeof(uint16_t))]] = uint16_t;

// Visits the numbers up to `count`, a few at a time: `act(first, few)`, how many as a type.
template <class Act>
[[gnu::always_inline]] inline void for_each_few(int64_t count, Act&& act) {
  constexpr int kFew = 4;
  int64_t i = 0;
  for (; i + kFew <= count; i += kFew) act(i, std::integral_constant<int, kFew>());
  for (; i < count; ++i) act(i, std::integral_constant<int, 1>());
}

// Subtracting zero changes no number, so that the compiler leaves a plain broadcast.
inline Lanes splat(float x) { return x - Lanes{}; }

inline Lanes load_lanes(const float* x) {
  Lanes lanes;
  std::memcpy(&lanes, x, sizeof lanes);
  return lanes;
}

inline void store_lanes(Lanes lanes, float* out) { std::memcpy(out, &lanes, sizeof lanes); }

inline Lanes widen_lanes(const float* x) { return load_lanes(x); }

inline Lanes widen_lanes(const BFloat16* x) {
  LaneShorts bits;
  std::memcpy(&bits, x, sizeof bits);
  return (Lanes)(__builtin_convertvector(bits, LaneBits) << 16);
}

inline Lanes widen_lanes(const Half* x) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  float wide[kLanes];
  load(x, wide, kLanes);
  return load_lanes(wide);
#endif
}

inline void narrow_lanes(Lanes x, float* out) { store_lanes(x, out); }

inline void narrow_lanes(Lanes x, BFloat16* out) {
  const LaneBits bits = (LaneBits)x;
  const LaneBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const LaneShorts result = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40u, LaneShorts);
  std::memcpy(out, &result, sizeof result);
}

inline void narrow_lanes(Lanes x, Half* out) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm512_maskz_cvtps_ph(kAllLanes, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  store(reinterpret_cast<const float*>(&x), out, kLanes);
#endif
}

// sum + x * y, rounded once wherever the instruction set can: left to itself, the compiler decides otherwise from loop
// to loop, and a query's bits would depend on its neighbors.
inline Lanes multiply_add(Lanes x, Lanes y, Lanes sum) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
#elif defined(__FMA__)
  return (Lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
  return sum + x * y;
#endif
}

// The same, into a register that keeps its sum: the compiler would move it from one to another. A sum that the
// instruction wrote in place, without `kept`, would live in memory.
[[gnu::always_inline]] inline void accumulate(Lanes x, Lanes y, Lanes& sum) {
#if defined(__FMA__)
  Lanes kept = sum;
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(kept) : "v"(x), "v"(y));
#else
  asm("vfmadd231ps %2, %1, %0" : "+x"(kept) : "x"(x), "x"(y));
#endif
  sum = kept;
#else
  sum += x * y;
#endif
}

#if defined(__AVX512BF16__) || defined(NATTEN2_EMULATE_BF16)
#define NATTEN2_PAIRS
#endif

// Whether scores multiply a storage type's numbers as they are stored: two channels in the 32 bits of a lane.
template <class Storage>
constexpr bool kInPairs = false;
#ifdef NATTEN2_PAIRS
template <>
inline constexpr bool kInPairs<BFloat16> = true;
#endif

// Vectors of channels, or of pairs of them.
template <class Storage>
constexpr int64_t score_channels(int64_t channels) {
  return kInPairs<Storage> ? (channels + 1) / 2 : channels;
}

// Adds the products of pairs of bfloat16s, of which the instruction takes subnormal ones for zero.
[[gnu::always_inline]] inline void accumulate_pairs(Lanes x, Lanes y, Lanes& sum) {
#if defined(__AVX512BF16__)
  Lanes kept = sum;
  asm("vdpbf16ps %2, %1, %0" : "+v"(kept) : "v"(x), "v"(y));
  sum = kept;
#else
  const LaneBits kHigh = LaneBits{} + 0xffff0000u;
  accumulate((Lanes)((LaneBits)x & kHigh), (Lanes)((LaneBits)y & kHigh), sum);
  accumulate((Lanes)((LaneBits)x << 16), (Lanes)((LaneBits)y << 16), sum);
#endif
}

// Keeps the compiler from loading again what it has loaded, once for each use.
inline Lanes held(Lanes x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE2__)
  asm("" : "+x"(x));
#endif
  return x;
}

// Lane i is number index[i] of a vector.
inline Lanes permute(Lanes x, LaneInts index) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Lanes)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
#else
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result[i] = x[index[i]];
  return result;
#endif
}

// Each lane from one of two vectors that follow each other: lane i is number index[i] of both.
inline Lanes pick(Lanes low, Lanes high, LaneInts index) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_permutex2var_ps((__m512)low, (__m512i)index, (__m512)high);
#elif defined(__AVX2__)
  const __m256 first = _mm256_permutevar8x32_ps((__m256)low, (__m256i)index);
  const __m256 second = _mm256_permutevar8x32_ps((__m256)high, (__m256i)index);
  return (Lanes)_mm256_blendv_ps(first, second, (__m256)(index << 28));
#else
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result[i] = index[i] < kLanes ? low[index[i]] : high[index[i] - kLanes];
  return result;
#endif
}

// Whether all lanes of a comparison hold.
inline bool all_lanes(LaneInts holds) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)holds) == kAllLanes;
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)holds) == 0xff;
#else
  for (int i = 0; i < kLanes; ++i)
    if (!holds[i]) return false;
  return true;
#endif
}

// The larger of each pair; the second where one is NaN.
inline Lanes larger_lanes(Lanes x, Lanes y) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_max_ps(kAllLanes, (__m512)x, (__m512)y);
#elif defined(__AVX__)
  return (Lanes)_mm256_max_ps((__m256)x, (__m256)y);
#else
  return x > y ? x : y;
#endif
}

inline Lanes smaller_lanes(Lanes x, Lanes y) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_min_ps(kAllLanes, (__m512)x, (__m512)y);
#elif defined(__AVX__)
  return (Lanes)_mm256_min_ps((__m256)x, (__m256)y);
#else
  return x < y ? x : y;
#endif
}

// Replaces x by e^x as for numbers. With AVX-512 it may also be subnormal, and is finite up to where it overflows.
template <int kCount>
[[gnu::always_inline]] inline void exponentiate(Lanes (&x)[kCount]) {
  constexpr Exponential kConstants;
  Lanes shifted[kCount], count[kCount], rest[kCount];
  const auto for_each = [](auto&& act) NATTEN2_INLINE { unrolled<0, kCount>(act); };
#if defined(__AVX512F__)
  for_each([&](auto i) NATTEN2_INLINE { x[i] = larger_lanes(splat(-104.0f), x[i]); });
#else
  for_each([&](auto i) NATTEN2_INLINE {
    x[i] = smaller_lanes(splat(kConstants.most), larger_lanes(splat(kConstants.least), x[i]));
  });
#endif
  for_each([&](auto i) NATTEN2_INLINE { shifted[i] = x[i] * kConstants.log2_e + kConstants.round; });
  for_each([&](auto i) NATTEN2_INLINE { count[i] = shifted[i] - kConstants.round; });
  for_each([&](auto i) NATTEN2_INLINE { rest[i] = x[i] - count[i] * kConstants.ln2_high; });
  for_each([&](auto i) NATTEN2_INLINE { rest[i] -= count[i] * kConstants.ln2_low; });
  exponentiate_near_zero(rest, x);
#if defined(__AVX512F__)
  for_each([&](auto i)
               NATTEN2_INLINE { x[i] = (Lanes)_mm512_maskz_scalef_ps(kAllLanes, (__m512)x[i], (__m512)count[i]); });
#else
  for_each([&](auto i) NATTEN2_INLINE { x[i] *= (Lanes)((LaneInts)shifted[i] << 23); });
#endif
}

// The natural logarithm within 3 units in the last place or 1e-7, whichever is more; for what is no positive normal
// number, the standard library's.
inline Lanes logarithm(Lanes x) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kRootHalf = 0.707106781f;
  // x = mantissa * 2^exponent with a mantissa between the roots of 1/2 and 2.
  const LaneInts offset = (LaneInts)x - (LaneInts)splat(kRootHalf);
  const LaneInts exponent = offset >> 23;
  const Lanes rest = (Lanes)((LaneInts)x - (exponent << 23)) - 1.0f;
  const Lanes count = __builtin_convertvector(exponent, Lanes);
  Lanes polynomial = 7.0376836292e-2f * rest - 1.1514610310e-1f;
  polynomial = polynomial * rest + 1.1676998740e-1f;
  polynomial = polynomial * rest - 1.2420140846e-1f;
  polynomial = polynomial * rest + 1.4249322787e-1f;
  polynomial = polynomial * rest - 1.6668057665e-1f;
  polynomial = polynomial * rest + 2.0000714765e-1f;
  polynomial = polynomial * rest - 2.4999993993e-1f;
  polynomial = polynomial * rest + 3.3333331174e-1f;
  const Lanes square = rest * rest;
  Lanes result = rest + (polynomial * rest * square + (count * kLn2Low - 0.5f * square)) + count * kLn2High;
  const LaneInts is_normal = (x >= splat(1.17549435e-38f)) & (x <= splat(3.40282347e38f));
  if (!all_lanes(is_normal))
    for (int i = 0; i < kLanes; ++i)
      if (!is_normal[i]) result[i] = std::log(x[i]);
  return result;
}

// Interleaves runs of kRun lanes from the first or second half of each quarter vector, as one instruction does.
template <int kRun, int kHalf, int... kIndex>
inline Lanes interleave(Lanes x, Lanes y, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(
      x, y,
      ((kIndex & ~3) + 2 * kHalf +
       (kRun == 1 ? (kIndex & 3) / 2 + kLanes * (kIndex & 1) : (kIndex & 1) + kLanes * ((kIndex & 3) / 2)))...);
}

// Every second quarter of two vectors, from the first one or from the next.
template <int kFirst, int... kIndex>
inline Lanes quarters(Lanes x, Lanes y, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(x, y, (kIndex / 4 * 8 + 4 * kFirst + kIndex % 4)...);
}

inline void transpose(Lanes (&rows)[kLanes]) {
  constexpr auto kIndex = std::make_integer_sequence<int, kLanes>();
  // Squares of 4 rows and 4 lanes first.
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const Lanes low0 = interleave<1, 0>(rows[i], rows[i + 1], kIndex);
    const Lanes high0 = interleave<1, 1>(rows[i], rows[i + 1], kIndex);
    const Lanes low1 = interleave<1, 0>(rows[i + 2], rows[i + 3], kIndex);
    const Lanes high1 = interleave<1, 1>(rows[i + 2], rows[i + 3], kIndex);
    rows[i] = interleave<2, 0>(low0, low1, kIndex);
    rows[i + 1] = interleave<2, 1>(low0, low1, kIndex);
    rows[i + 2] = interleave<2, 0>(high0, high1, kIndex);
    rows[i + 3] = interleave<2, 1>(high0, high1, kIndex);
  }
  // Then the squares change places.
  if constexpr (kLanes == 8) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Lanes first = quarters<0>(rows[i], rows[4 + i], kIndex);
      rows[4 + i] = quarters<1>(rows[i], rows[4 + i], kIndex);
      rows[i] = first;
    }
  }
  if constexpr (kLanes == 16) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Lanes even0 = quarters<0>(rows[i], rows[4 + i], kIndex);
      const Lanes odd0 = quarters<1>(rows[i], rows[4 + i], kIndex);
      const Lanes even1 = quarters<0>(rows[8 + i], rows[12 + i], kIndex);
      const Lanes odd1 = quarters<1>(rows[8 + i], rows[12 + i], kIndex);
      rows[i] = quarters<0>(even0, even1, kIndex);
      rows[8 + i] = quarters<1>(even0, even1, kIndex);
      rows[4 + i] = quarters<0>(odd0, odd1, kIndex);
      rows[12 + i] = quarters<1>(odd0, odd1, kIndex);
    }
  }
}

// A vector of channels of which only `count` exist; the others are zero.
template <class Storage>
inline Lanes widen_some(const Storage* x, int64_t count) {
  if (count >= kLanes) return widen_lanes(x);
  Storage some[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = x[i];
  return widen_lanes(some);
}

template <class Storage>
inline void narrow_some(Lanes x, Storage* out, int64_t count) {
  if (count >= kLanes) return narrow_lanes(x, out);
  Storage some[kLanes];
  narrow_lanes(x, some);
  for (int64_t i = 0; i < count; ++i) out[i] = some[i];
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

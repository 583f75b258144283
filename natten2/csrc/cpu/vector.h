// The inner loops: contiguous rows of channels or slots, vectorised by the compiler.
#pragma once

#include <cmath>
#include <limits>

#include "scalar.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

template <class Storage, class Acc>
inline Acc dot(const Storage* x, const Acc* y, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += widen(x[i]) * y[i];
  return sum;
}

template <class Storage, class Acc>
inline void add_scaled(Acc factor, const Storage* x, Acc* sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * widen(x[i]);
}

template <class Acc>
inline void fill_zero(Acc* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

template <class Storage, class Acc>
inline void load_scaled(const Storage* x, Acc factor, Acc* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]) * factor;
}

template <class Storage, class Acc>
inline void store_scaled(const Acc* x, Acc factor, Storage* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<Storage>(x[i] * factor);
}

// e^x within 2 units in the last place, also where the result is subnormal; 0 and infinity beyond, NaN for NaN.
inline float exponential(float x) {
  constexpr float kLog2E = 1.44269504089f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * kLog2E + kRound;
  const float count = shifted - kRound;
  const float rest = (x - count * kLn2High) - count * kLn2Low;
  float polynomial = 1.9875691500e-4f;
  polynomial = polynomial * rest + 1.3981999507e-3f;
  polynomial = polynomial * rest + 8.3334519073e-3f;
  polynomial = polynomial * rest + 4.1665795894e-2f;
  polynomial = polynomial * rest + 1.6666665459e-1f;
  polynomial = polynomial * rest + 5.0000001201e-1f;
  polynomial = polynomial * rest * rest + rest + 1.0f;
  // 2^count in two factors, since the exponent of one would overflow at both ends.
  const int32_t exponent = bit_cast<int32_t>(shifted) - bit_cast<int32_t>(kRound);
  const int32_t half = exponent >> 1;
  const float first = bit_cast<float>(static_cast<uint32_t>(half + 127) << 23);
  const float second = bit_cast<float>(static_cast<uint32_t>(exponent - half + 127) << 23);
  return polynomial * first * second;
}
inline double exponential(double x) { return std::exp(x); }

// Replaces x by e^(x - shift) and returns the sum.
template <class Acc>
inline Acc exponentiate(Acc* x, Acc shift, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exponential(x[i] - shift);
    sum += x[i];
  }
  return sum;
}

// NaN counts as smallest.
template <class Acc>
inline Acc maximum(const Acc* x, int64_t n) {
  Acc result = -std::numeric_limits<Acc>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

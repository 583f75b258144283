// The inner loops: contiguous rows of channels or slots, vectorised by the compiler.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "arena.h"
#include "scalar.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Shorter rows than this aren't worth the set-up of a vector loop.
constexpr int64_t kShort = 4;

template <class Acc>
inline Acc dot(const Acc* x, const Acc* y, int64_t n) {
  Acc sum = 0;
  if (n < kShort) {
    for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
    return sum;
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

template <class Acc>
inline void add_scaled(Acc factor, const Acc* x, Acc* sum, int64_t n) {
  if (n < kShort) {
    for (int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * x[i];
}

template <class Acc>
inline void fill_zero(Acc* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = 0;
}

template <class Acc>
inline void copy(const Acc* x, Acc* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = x[i];
}

template <class Acc>
inline void multiply(Acc factor, Acc* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

template <class Storage, class Acc>
inline void load(const Storage* x, Acc* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

#ifdef __F16C__
// The compiler doesn't find these instructions. Stores are as wide as the loads that follow, so that they are
// forwarded.
inline void load(const Half* x, float* out, int64_t n) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i,
                     _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
#endif
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) out[i] = _cvtsh_ss(x[i].bits);
}
#endif

// The row itself where it is stored in the accumulation type, else a widened copy in `scratch`.
template <class Storage, class Acc>
inline const Acc* widened(const Storage* x, Acc* scratch, int64_t n) {
  if constexpr (std::is_same_v<Storage, Acc>) {
    return x;
  } else {
    load(x, scratch, n);
    return scratch;
  }
}

template <class Storage, class Acc>
inline void store(const Acc* x, Storage* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<Storage>(x[i]);
}

// e^x for numbers, or vectors of them, of at most ln 2 / 2.
template <class Number>
inline Number exponential_near_zero(Number x) {
  Number result = 1.3814540580e-3f * x + 8.3687454462e-3f;
  result = result * x + 4.1668388993e-2f;
  result = result * x + 1.6666521132e-1f;
  result = result * x + 4.9999994040e-1f;
  result = result * x + 1.0f;
  return result * x + 1.0f;
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
  const float polynomial = exponential_near_zero(rest);
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
inline double exponentiate(Acc* x, Acc shift, int64_t n) {
  constexpr int64_t kPiece = 1024;
  double total = 0;
  for (int64_t first = 0; first < n; first += kPiece) {
    const int64_t last = first + kPiece < n ? first + kPiece : n;
    Acc sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) {
      x[i] = exponential(x[i] - shift);
      sum += x[i];
    }
    total += sum;
  }
  return total;
}

// Rows shorter than this leave most of a vector empty.
constexpr int64_t kShortRow = 16;

// Replaces x by e^(x - shift of its row) in rows that follow each other, which share vectors where they are short.
template <class Acc>
inline void exponentiate_rows(Acc* x, const Acc* shift, int64_t rows, int64_t n) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < n; ++i) x[row * n + i] -= shift[row];
#pragma omp simd
  for (int64_t i = 0; i < rows * n; ++i) x[i] = exponential(x[i]);
}

// NaN counts as smallest.
template <class Acc>
inline Acc maximum(const Acc* x, int64_t n) {
  Acc result = -std::numeric_limits<Acc>::infinity();
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// A sum of many rows, taken in blocks: rounding errors grow with the length of a block and the number of blocks, not
// with the number of rows.
template <class Acc>
class RowSum {
 public:
  RowSum(int64_t size, Arena& arena) : size_(size), block_(arena.take<Acc>(size)), total_(arena.take<Acc>(size)) {}

  void clear() {
    rows_ = 0;
    fill_zero(block_, size_);
    fill_zero(total_, size_);
  }

  // Where to add the next row.
  Acc* next() {
    if (rows_++ % kRows == 0 && rows_ > 1) flush();
    return block_;
  }

  // All rows since `clear`, which may be changed in place.
  Acc* total() {
    flush();
    return total_;
  }

 private:
  static constexpr int64_t kRows = 128;

  void flush() {
    for (int64_t i = 0; i < size_; ++i) total_[i] += block_[i];
    fill_zero(block_, size_);
  }

  int64_t size_;
  int64_t rows_ = 0;
  Acc* block_;
  Acc* total_;
};

}  // namespace NATTEN2_ISA
}  // namespace natten2::cpu

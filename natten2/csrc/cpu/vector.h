// The inner loops: contiguous rows of channels or slots, vectorised by the compiler.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "arena.h"
#include "scalar.h"

namespace natten2::cpu {
inline namespace NATTEN2_ISA {

// Of a lambda.
#define NATTEN2_INLINE __attribute__((always_inline))

// Calls `act` with the constants kBegin to kEnd - 1. Unrolled by the language, since arrays of vectors that a loop
// indexes, unrolled or not, the compiler would keep in memory.
template <int kBegin, int kEnd, class Act>
[[gnu::always_inline]] inline void unrolled(Act&& act) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) NATTEN2_INLINE {
    (act(std::integral_constant<int, kBegin + kIndex>()), ...);
  }(std::make_integer_sequence<int, kEnd - kBegin>());
}

// Shorter rows than this aren't worth the set-up of a vector loop.
constexpr int64_t kShort = 4;

// Of the longest vectors.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The sum of a vector's numbers, added up in halves.
template <class Vector>
inline auto total(Vector x) {
  using Number = std::decay_t<decltype(x[0])>;
  if constexpr (sizeof x == sizeof(Number)) {
    return x[0];
  } else {
    using Part [[gnu::vector_size(sizeof x / 2)]] = Number;
    Part halves[2];
    std::memcpy(halves, &x, sizeof x);
    return total(halves[0] + halves[1]);
  }
}

// In vectors of kBytes; what is left in shorter ones.
template <int kBytes = kVectorBytes, class Acc>
inline Acc dot(const Acc* x, const Acc* y, int64_t n) {
  if constexpr (kBytes == sizeof(Acc)) {
    return n > 0 ? *x * *y : 0;
  } else {
    constexpr int64_t kCount = kBytes / sizeof(Acc);
    using Vector [[gnu::vector_size(kBytes)]] = Acc;
    if (n < kCount) return dot<kBytes / 2>(x, y, n);
    Vector sum = {};
    int64_t i = 0;
    for (; i + kCount <= n; i += kCount) {
      Vector part, factor;
      std::memcpy(&part, x + i, kBytes);
      std::memcpy(&factor, y + i, kBytes);
      sum += part * factor;
    }
    const Acc rest = i < n ? dot<kBytes / 2>(x + i, y + i, n - i) : 0;
    return rest + total(sum);
  }
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

// e^x of at most ln 2 / 2, for numbers or vectors of them: step by step, so that chains of operations run side by side.
template <class Number, int kCount>
[[gnu::always_inline]] inline void exponentiate_near_zero(const Number (&x)[kCount], Number (&result)[kCount]) {
  constexpr float kFactors[] = {8.3687454462e-3f, 4.1668388993e-2f, 1.6666521132e-1f, 4.9999994040e-1f, 1.0f, 1.0f};
  unrolled<0, kCount>([&](auto i) NATTEN2_INLINE { result[i] = 1.3814540580e-3f * x[i] + kFactors[0]; });
  unrolled<1, 6>([&](auto step) NATTEN2_INLINE {
    unrolled<0, kCount>([&](auto i) NATTEN2_INLINE { result[i] = result[i] * x[i] + kFactors[step]; });
  });
}

// Of e^x = 2^count * e^rest.
struct Exponential {
  float log2_e = 1.44269504089f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  // 1.5 * 2^23 + 127: adding it leaves a rounded number in the low bits, as the exponent of a float that is 2 to its
  // power, or 0 from -127 down.
  float round = 12583039.0f;
  float least = -88.0f, most = 89.0f;
};

// e^x within 2 units in the last place; 0 where that is less than about 2^-126, infinity from 88.4 on, NaN for NaN.
inline float exponential(float x) {
  constexpr Exponential kConstants;
  x = x < kConstants.least ? kConstants.least : x;
  x = x > kConstants.most ? kConstants.most : x;
  const float shifted = x * kConstants.log2_e + kConstants.round;
  const float count = shifted - kConstants.round;
  const float rest[] = {(x - count * kConstants.ln2_high) - count * kConstants.ln2_low};
  float result[1];
  exponentiate_near_zero(rest, result);
  return result[0] * bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
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

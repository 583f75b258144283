// The geometry of neighborhood attention along one axis, for host and device. natten2/window.py explains it.
#pragma once

#include <cstdint>

#include "isa.h"

namespace natten2 {

// One axis of the token grid and the window's parameters along it. GPUs count in 32 bits, where divisions are short.
template <class Int>
struct BasicAxis {
  Int length;
  Int kernel_size;
  Int stride;
  Int dilation;
  bool is_causal;
};

using Axis = BasicAxis<int64_t>;

// Keeps the other arguments of a function from deciding what Int is.
template <class T>
struct Same {
  using type = T;
};

inline namespace NATTEN2_ISA {

// A half-open interval of positions inside a dilation group.
template <class Int>
struct BasicInterval {
  Int begin;
  Int end;

  NATTEN2_HOST_DEVICE constexpr Int size() const { return end - begin; }
};

using Interval = BasicInterval<int64_t>;

template <class Int = int64_t>
NATTEN2_HOST_DEVICE constexpr Int smaller(typename Same<Int>::type a, typename Same<Int>::type b) {
  return a < b ? a : b;
}

template <class Int = int64_t>
NATTEN2_HOST_DEVICE constexpr Int larger(typename Same<Int>::type a, typename Same<Int>::type b) {
  return a < b ? b : a;
}

NATTEN2_HOST_DEVICE constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// a / b, at once where b is 1, as strides and dilations mostly are: divisions take longer than all else in this file.
template <class Int = int64_t>
NATTEN2_HOST_DEVICE constexpr Int quotient(typename Same<Int>::type a, typename Same<Int>::type b) {
  return b == 1 ? a : a / b;
}

template <class Int>
NATTEN2_HOST_DEVICE constexpr Int group_length(const BasicAxis<Int>& axis, typename Same<Int>::type group) {
  return quotient<Int>(axis.length + axis.dilation - 1 - group, axis.dilation);
}

// The keys that the query at `position` of a group of `length` positions sees.
template <class Int>
NATTEN2_HOST_DEVICE constexpr BasicInterval<Int> key_bounds(const BasicAxis<Int>& axis, typename Same<Int>::type length,
                                                            typename Same<Int>::type position) {
  const Int first = quotient<Int>(position, axis.stride) * axis.stride;
  if (axis.is_causal) {
    const Int leader = smaller<Int>(first + axis.stride - 1, length - 1);
    return {larger<Int>(leader - axis.kernel_size + 1, 0), position + 1};
  }
  const Int leader = smaller<Int>(first + axis.stride / 2, length - 1);
  const Int start = smaller<Int>(larger<Int>(leader - axis.kernel_size / 2, 0), length - axis.kernel_size);
  return {start, start + axis.kernel_size};
}

// The queries that see the key at `position`: the inverse of key_bounds.
template <class Int>
NATTEN2_HOST_DEVICE constexpr BasicInterval<Int> query_bounds(const BasicAxis<Int>& axis,
                                                              typename Same<Int>::type length,
                                                              typename Same<Int>::type position) {
  if (axis.is_causal) {
    if (position + axis.kernel_size >= length) return {position, length};
    return {position, smaller<Int>(quotient<Int>(position + axis.kernel_size, axis.stride) * axis.stride, length)};
  }
  const Int middle = axis.stride / 2;
  const Int strides = quotient<Int>(length + axis.stride - 1, axis.stride);
  const Int first_leader = position < axis.kernel_size ? 0 : position - (axis.kernel_size - 1) / 2;
  const Int last_leader = position >= length - axis.kernel_size ? length - 1 : position + axis.kernel_size / 2;
  const Int first = first_leader <= middle ? 0 : quotient<Int>(first_leader - middle + axis.stride - 1, axis.stride);
  const Int last = last_leader >= length - 1 ? strides - 1 : quotient<Int>(last_leader - middle, axis.stride);
  return {first * axis.stride, smaller<Int>((last + 1) * axis.stride, length)};
}

}  // namespace NATTEN2_ISA
}  // namespace natten2

// The geometry of neighborhood attention along one axis, for host and device. natten2/window.py explains it.
#pragma once

#include <cstdint>

#include "isa.h"

namespace natten2 {

// One axis of the token grid and the window's parameters along it.
struct Axis {
  int64_t length;
  int64_t kernel_size;
  int64_t stride;
  int64_t dilation;
  bool is_causal;
};

inline namespace NATTEN2_ISA {

// A half-open interval of positions inside a dilation group.
struct Interval {
  int64_t begin;
  int64_t end;

  NATTEN2_HOST_DEVICE constexpr int64_t size() const { return end - begin; }
};

NATTEN2_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NATTEN2_HOST_DEVICE constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

NATTEN2_HOST_DEVICE constexpr int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// a / b, at once where b is 1, as strides and dilations mostly are: divisions take longer than all else in this file.
NATTEN2_HOST_DEVICE constexpr int64_t quotient(int64_t a, int64_t b) { return b == 1 ? a : a / b; }

NATTEN2_HOST_DEVICE constexpr int64_t group_length(const Axis& axis, int64_t group) {
  return quotient(axis.length + axis.dilation - 1 - group, axis.dilation);
}

// The keys that the query at `position` of a group of `length` positions sees.
NATTEN2_HOST_DEVICE constexpr Interval key_bounds(const Axis& axis, int64_t length, int64_t position) {
  const int64_t first = quotient(position, axis.stride) * axis.stride;
  if (axis.is_causal) {
    const int64_t leader = smaller(first + axis.stride - 1, length - 1);
    return {larger(leader - axis.kernel_size + 1, 0), position + 1};
  }
  const int64_t leader = smaller(first + axis.stride / 2, length - 1);
  const int64_t start = smaller(larger(leader - axis.kernel_size / 2, 0), length - axis.kernel_size);
  return {start, start + axis.kernel_size};
}

// The queries that see the key at `position`: the inverse of key_bounds.
NATTEN2_HOST_DEVICE constexpr Interval query_bounds(const Axis& axis, int64_t length, int64_t position) {
  if (axis.is_causal) {
    if (position + axis.kernel_size >= length) return {position, length};
    return {position, smaller(quotient(position + axis.kernel_size, axis.stride) * axis.stride, length)};
  }
  const int64_t middle = axis.stride / 2;
  const int64_t strides = quotient(length + axis.stride - 1, axis.stride);
  const int64_t first_leader = position < axis.kernel_size ? 0 : position - (axis.kernel_size - 1) / 2;
  const int64_t last_leader = position >= length - axis.kernel_size ? length - 1 : position + axis.kernel_size / 2;
  const int64_t first = first_leader <= middle ? 0 : quotient(first_leader - middle + axis.stride - 1, axis.stride);
  const int64_t last = last_leader >= length - 1 ? strides - 1 : quotient(last_leader - middle, axis.stride);
  return {first * axis.stride, smaller((last + 1) * axis.stride, length)};
}

}  // namespace NATTEN2_ISA
}  // namespace natten2

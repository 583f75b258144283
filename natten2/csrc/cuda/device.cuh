// What the kernels ask of a GPU, one function for each instruction. Compiled for the host, every function is emulated,
// lane by lane (emulation.h), so that tests run the kernels as they are where there is no GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define NATTEN2_DEVICE __device__ __forceinline__
#define NATTEN2_APART __device__ __noinline__
#define NATTEN2_KERNEL __global__
#define NATTEN2_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define NATTEN2_CONSTANT const __grid_constant__
#define NATTEN2_UNROLL _Pragma("unroll")
#define NATTEN2_UNROLL_SOME _Pragma("unroll 2")
#define NATTEN2_ROLL _Pragma("unroll 1")
#else
#define NATTEN2_DEVICE inline
#define NATTEN2_APART inline
#define NATTEN2_KERNEL
#define NATTEN2_BOUNDS(threads, blocks)
#define NATTEN2_CONSTANT const
#define NATTEN2_UNROLL
#define NATTEN2_UNROLL_SOME
#define NATTEN2_ROLL
#include "emulation.h"
#endif

namespace natten2::cuda {

constexpr int kLanes = 32;

struct alignas(16) Words {
  uint32_t word[4];
};

#ifdef __CUDACC__

NATTEN2_DEVICE uint32_t thread_index() { return threadIdx.x; }
NATTEN2_DEVICE uint32_t block_index() { return blockIdx.x; }
NATTEN2_DEVICE int block_row() { return blockIdx.y; }

NATTEN2_DEVICE unsigned char* shared_memory() {
  extern __shared__ unsigned char memory[];
  return memory;
}

NATTEN2_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

NATTEN2_DEVICE void sync_block() { __syncthreads(); }
NATTEN2_DEVICE bool any_of_block(bool condition) { return __syncthreads_or(condition); }
NATTEN2_DEVICE void sync_warp() { __syncwarp(); }
NATTEN2_DEVICE bool any_of_warp(bool condition) { return __any_sync(~0u, condition); }
NATTEN2_DEVICE int smallest_of_warp(int number) { return __reduce_min_sync(~0u, number); }
NATTEN2_DEVICE int largest_of_warp(int number) { return __reduce_max_sync(~0u, number); }

// Adds to shared memory, where no two lanes may add to the same number; afterwards all lanes see it.
NATTEN2_DEVICE void add_apart(float* sum, float number, bool adds) {
  if (adds) *sum += number;
  __syncwarp();
}

template <class T>
NATTEN2_DEVICE T shuffle(T number, int lane) {
  return __shfl_sync(~0u, number, lane);
}

NATTEN2_DEVICE float shuffle_xor(float number, int mask) { return __shfl_xor_sync(~0u, number, mask); }

// 16 bytes, or zeros, past the registers and the first cache.
NATTEN2_DEVICE void copy_16(void* shared, const void* global, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(is_there ? 16 : 0)
               : "memory");
}

NATTEN2_DEVICE void copy_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

NATTEN2_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups of copies are under way.
template <int kPending>
NATTEN2_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16 bits; lane i says where row i % 8 of matrix i / 8 is, and gets two neighbors of row i / 4.
NATTEN2_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, but lane i gets two neighbors of column i / 4.
NATTEN2_DEVICE void load_transposed_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += left [16, 16] @ right [16, 8].
NATTEN2_DEVICE void multiply_half(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

NATTEN2_DEVICE void multiply_bfloat16(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

// sum += left [16, 8] @ right [8, 8].
NATTEN2_DEVICE void multiply_tf32(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
}

NATTEN2_DEVICE uint32_t to_bits(float number) { return __float_as_uint(number); }
NATTEN2_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }

NATTEN2_DEVICE uint32_t round_to_tf32(float number) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(number));
  return bits;
}

// Two numbers in one word, the first in its lower half.
NATTEN2_DEVICE uint32_t pack_half(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

NATTEN2_DEVICE uint32_t pack_bfloat16(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

NATTEN2_DEVICE float widen_half(uint16_t bits) {
  float number;
  asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
  return number;
}

// 2 to a power, to 2 units in the last place.
NATTEN2_DEVICE float power_of_two(float exponent) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
}

NATTEN2_DEVICE float logarithm(float number) { return log2f(number); }

#endif

// Unsigned, so that divisions of them are shifts.
NATTEN2_DEVICE uint32_t lane_index() { return thread_index() % kLanes; }
NATTEN2_DEVICE uint32_t warp_index() { return thread_index() / kLanes; }

NATTEN2_DEVICE float widen_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

}  // namespace natten2::cuda

/* Multiply-adds between registers alone: as fast as one thread of this processor computes in float32. */

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

/* Sums in flight, to hide the latency of an addition: at most what the registers hold beside a factor and an addend. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define SUMS 24
#else
#define SUMS 12
#endif

typedef float Vector __attribute__((vector_size(BYTES)));

/* Operations of one step of fma_loop; a multiply-add is two. */
long fma_flops(void) { return 2L * SUMS * (BYTES / sizeof(float)); }

float fma_loop(long steps, float factor, float addend) {
  Vector sums[SUMS];
#pragma GCC unroll 24
  for (int i = 0; i < SUMS; ++i) sums[i] = (Vector){0} + (float)i;
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < SUMS; ++i) sums[i] = sums[i] * factor + addend;
  }
  Vector total = {0};
#pragma GCC unroll 24
  for (int i = 0; i < SUMS; ++i) total += sums[i];
  return total[0];
}

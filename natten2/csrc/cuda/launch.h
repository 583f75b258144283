// Runs the kernels of one dtype and number of channels.
#pragma once

#include <type_traits>

#include "backward.cuh"
#include "forward.cuh"
#include "plan.h"

namespace natten2::cuda {

constexpr Failure kDoesNotFit = "the problem does not fit into the kernels' shared memory";

// Starts a kernel, with the shared memory that each of its blocks needs.
#ifdef __CUDACC__
template <class Arguments>
Failure start_kernel(void (*kernel)(Arguments), uint32_t blocks, int rows, int shared_bytes, void* stream,
                     const std::remove_const_t<Arguments>& args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<dim3(blocks, rows), kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
template <class Arguments>
Failure start_kernel(void (*kernel)(Arguments), uint32_t blocks, int rows, int shared_bytes, void*,
                     const std::remove_const_t<Arguments>& args) {
  for (int row = 0; row < rows; ++row)
    for (uint32_t block = 0; block < blocks; ++block)
      Emulation::get().run(block, row, kThreads, shared_bytes, [&] { kernel(args); });
  return nullptr;
}
#endif

inline int offset_count(const Problem& problem) {
  int64_t count = 1;
  for (const auto& axis : problem.axes) count *= 2 * axis.kernel_size - 1;
  return static_cast<int>(std::min<int64_t>(count, INT32_MAX));
}

inline uint32_t count_parts(const Plan& plan, int heads) { return std::min(plan.items, kMostBlocks / heads); }

template <class Number, int kChannels>
Failure run_forward(const Forward& args, void* stream) {
  using Kernel = ForwardKernel<Number, kChannels>;
  const Problem& problem = args.problem;
  ForwardCall call = {args, {}, {}};
  const int offsets = args.bias ? offset_count(problem) : 0;
  if (!make_plan(problem, {Owner::kQueries, Kernel::kRowBytes, 1, 0, offsets, false}, call.plan)) return kDoesNotFit;
  call.plan.parts = count_parts(call.plan, problem.heads);
  call.layout = make_layout(call.plan, Kernel::kRowBytes, 1, 0);
  return start_kernel(forward_kernel<Number, kChannels>, call.plan.parts * problem.heads, 1, call.layout.total, stream,
                      call);
}

template <class Number, int kChannels, bool kOwnsKeys>
Failure run_gather(const Backward& args, Owner owner, void* stream) {
  using Kernel = BackwardKernel<Number, kChannels, kOwnsKeys>;
  const Problem& problem = args.forward.problem;
  BackwardCall call = {args, {}, {}};
  Plan& plan = call.plan;
  const bool sums_bias = owner == Owner::kQueries && args.grad_bias;
  const int offsets = args.forward.bias && owner != Owner::kAdditional ? offset_count(problem) : 0;
  if (!make_plan(problem, {owner, Kernel::kRowBytes, 2, Kernel::kNumbers, offsets, sums_bias}, plan))
    return kDoesNotFit;
  const int heads = kOwnsKeys ? problem.key_heads : problem.heads;
  plan.parts = sums_bias ? args.bias_parts : count_parts(plan, heads);
  if (plan.sees_all) plan.step_parts = args.additional_parts;
  call.layout = make_layout(plan, Kernel::kRowBytes, 2, Kernel::kNumbers);
  return start_kernel(backward_kernel<Number, kChannels, kOwnsKeys>, plan.parts * heads,
                      Kernel::kShares * plan.step_parts, call.layout.total, stream, call);
}

template <class Number, int kChannels>
Failure run_backward(const Backward& args, void* stream) {
  const Problem& problem = args.forward.problem;
  constexpr int kDeltaRows = kThreads / 4;
  int64_t rows = static_cast<int64_t>(problem.batch) * problem.heads;
  for (const auto& axis : problem.axes) rows *= axis.length;
  const int64_t blocks = (rows + kDeltaRows - 1) / kDeltaRows;
  if (blocks > kMostBlocks) return kDoesNotFit;
  Failure failure = start_kernel(delta_kernel<Number>, static_cast<uint32_t>(blocks), 1, 0, stream, args);
  if (!failure) failure = run_gather<Number, kChannels, false>(args, Owner::kQueries, stream);
  if (!failure) failure = run_gather<Number, kChannels, true>(args, Owner::kKeys, stream);
  if (!failure && args.grad_additional) failure = run_gather<Number, kChannels, true>(args, Owner::kAdditional, stream);
  return failure;
}

}  // namespace natten2::cuda

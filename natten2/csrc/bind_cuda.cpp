// The CUDA kernels under the names that natten2/ops/cuda_kernels.py defines: unpacks tensors, which were checked there.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace natten2::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Float:
      return Dtype::kFloat;
    default:
      throw std::invalid_argument("natten2: query must be float32, bfloat16, or float16");
  }
}

// [batch, *axes, head, ...] with one to three axes.
View grid_view(const Tensor& tensor, int rank, void* data) {
  View view = {data, tensor.stride(0), {0, 0, 0}, tensor.stride(1 + rank)};
  for (int axis = 0; axis < rank; ++axis) view.axis[kAxes - rank + axis] = tensor.stride(1 + axis);
  return view;
}

// Reading through a mutable pointer would make a tensor copy itself that shares its memory until it is written.
View input_view(const Tensor& tensor, int rank) {
  return grid_view(tensor, rank, const_cast<void*>(tensor.const_data_ptr()));
}

View input_view(const std::optional<Tensor>& tensor, int rank) { return tensor ? input_view(*tensor, rank) : View{}; }

View output_view(const Tensor& tensor, int rank) { return grid_view(tensor, rank, tensor.mutable_data_ptr()); }

float* output_numbers(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<float*>(tensor->mutable_data_ptr()) : nullptr;
}

struct Parameters {
  std::vector<int64_t> kernel_size;
  std::vector<int64_t> stride;
  std::vector<int64_t> dilation;
  std::vector<bool> is_causal;
  double scale;
  bool is_exact;
};

Problem make_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                     const std::optional<Tensor>& additional_keys, const Parameters& parameters) {
  const int rank = static_cast<int>(parameters.kernel_size.size());
  const auto number = [](int64_t size) { return static_cast<int32_t>(size); };
  Problem problem = {};
  problem.batch = number(query.size(0));
  problem.heads = number(query.size(rank + 1));
  problem.key_heads = number(key.size(rank + 1));
  problem.head_dim = number(query.size(rank + 2));
  problem.value_dim = number(value.size(rank + 2));
  problem.additional = additional_keys ? number(additional_keys->size(1)) : 0;
  problem.scale = static_cast<float>(parameters.scale);
  problem.is_exact = parameters.is_exact;
  std::fill(std::begin(problem.axes), std::end(problem.axes), BasicAxis<int32_t>{1, 1, 1, 1, false});
  for (int axis = 0; axis < rank; ++axis)
    problem.axes[kAxes - rank + axis] = {number(query.size(1 + axis)), number(parameters.kernel_size[axis]),
                                         number(parameters.stride[axis]), number(parameters.dilation[axis]),
                                         parameters.is_causal[axis]};
  return problem;
}

Kernels kernels_for(const Tensor& query, const Problem& problem) {
  return find_kernels(to_dtype(query.scalar_type()), std::max(problem.head_dim, problem.value_dim));
}

void require_success(Failure failure) {
  if (failure) throw std::runtime_error("natten2: a CUDA kernel can't run: " + std::string(failure));
}

void cuda_forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> bias,
                  std::optional<Tensor> additional_keys, std::optional<Tensor> additional_values,
                  std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> dilation,
                  std::vector<bool> is_causal, double scale, bool is_exact, int64_t stream, Tensor output,
                  Tensor logsumexp) {
  const int rank = static_cast<int>(kernel_size.size());
  const Problem problem =
      make_problem(query, key, value, additional_keys, {kernel_size, stride, dilation, is_causal, scale, is_exact});
  const Forward args = {problem,
                        input_view(query, rank),
                        input_view(key, rank),
                        input_view(value, rank),
                        input_view(additional_keys, 1),
                        input_view(additional_values, 1),
                        bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                        output_view(output, rank),
                        output_view(logsumexp, rank)};
  require_success(kernels_for(query, problem).forward(args, reinterpret_cast<void*>(stream)));
}

void cuda_backward(Tensor grad_output, std::optional<Tensor> grad_logsumexp, Tensor query, Tensor key, Tensor value,
                   std::optional<Tensor> bias, std::optional<Tensor> additional_keys,
                   std::optional<Tensor> additional_values, Tensor output, Tensor logsumexp,
                   std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> dilation,
                   std::vector<bool> is_causal, double scale, bool is_exact, int64_t stream, Tensor delta,
                   Tensor grad_query, Tensor grad_key, Tensor grad_value, std::optional<Tensor> grad_bias,
                   std::optional<Tensor> grad_additional, int64_t bias_parts, int64_t additional_parts) {
  const int rank = static_cast<int>(kernel_size.size());
  const Problem problem =
      make_problem(query, key, value, additional_keys, {kernel_size, stride, dilation, is_causal, scale, is_exact});
  const Forward forward = {problem,
                           input_view(query, rank),
                           input_view(key, rank),
                           input_view(value, rank),
                           input_view(additional_keys, 1),
                           input_view(additional_values, 1),
                           bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                           input_view(output, rank),
                           input_view(logsumexp, rank)};
  const Backward args = {forward,
                         input_view(grad_output, rank),
                         input_view(grad_logsumexp, rank),
                         output_view(delta, rank),
                         output_view(grad_query, rank),
                         output_view(grad_key, rank),
                         output_view(grad_value, rank),
                         output_numbers(grad_bias),
                         output_numbers(grad_additional),
                         static_cast<int32_t>(bias_parts),
                         static_cast<int32_t>(additional_parts)};
  require_success(kernels_for(query, problem).backward(args, reinterpret_cast<void*>(stream)));
}

}  // namespace
}  // namespace natten2::cuda

// Tests register the kernels for another device, where they are emulated.
#ifndef NATTEN2_CUDA_KEY
#define NATTEN2_CUDA_KEY CUDA
#endif

STABLE_TORCH_LIBRARY_IMPL(natten2, NATTEN2_CUDA_KEY, m) {
  m.impl("cuda_forward", TORCH_BOX(&natten2::cuda::cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&natten2::cuda::cuda_backward));
}

// The unfused pair under the operators' names; a part of bind_cpu.cpp, whose helpers it uses.
#pragma once

namespace natten2::cpu {
namespace {

int64_t count_slots(const Parameters& parameters, const std::optional<Tensor>& additional) {
  int64_t slots = additional ? additional->size(1) : 0;
  int64_t window = 1;
  for (const int64_t size : parameters.kernel_size) window *= size;
  return slots + window;
}

Shape with_last(const Tensor& tensor, int64_t last) {
  Shape result = shape(tensor);
  result.back() = last;
  return result;
}

Tensor with_contiguous_channels(Tensor tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// An empty tensor where there is nothing that it could be the gradient of.
Tensor allocate_gradient(const std::optional<Tensor>& tensor, ScalarType type) {
  return allocate(tensor ? shape(*tensor) : Shape{0}, tensor ? tensor->scalar_type() : type);
}

Unfused make_unfused(const Problem& problem, View queries, View keys, View additional, View scores) {
  return {problem, queries, keys, additional, scores, nullptr, 0.0, nullptr, 0};
}

// The checks of na_qk, which are na_forward's with the keys in the values' place.
Problem check_qk(const Inputs& inputs, const Parameters& parameters) {
  const Problem problem = make_problem(inputs, parameters);
  require_inputs(inputs, problem, static_cast<int>(parameters.kernel_size.size()));
  return problem;
}

Problem check_av(const Tensor& weights, const Tensor& value, const std::optional<Tensor>& additional_values,
                 const Parameters& parameters) {
  const int rank = static_cast<int>(parameters.kernel_size.size());
  Problem problem =
      make_problem({weights, value, value, std::nullopt, additional_values, additional_values}, parameters);
  problem.head_dim = problem.value_dim;
  const ScalarType type = weights.scalar_type();
  Shape values = with_last(weights, problem.value_dim);
  values[rank + 1] = problem.key_heads;
  require_tensor(weights, "weights", type, with_last(weights, count_slots(parameters, additional_values)));
  require_tensor(value, "value", type, values);
  require_channels(weights, "weights");
  require_channels(value, "value");
  if (additional_values) {
    require_tensor(*additional_values, "additional_values", type,
                   {problem.batch, problem.additional, problem.key_heads, problem.value_dim});
    require_channels(*additional_values, "additional_values");
  }
  return problem;
}

Tensor na_qk(Tensor query, Tensor key, std::optional<Tensor> rpb, std::optional<Tensor> additional_keys,
             std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> dilation,
             std::vector<bool> is_causal, double scale, double hidden) {
  const Inputs inputs = {query, key, key, rpb, additional_keys, additional_keys};
  const Parameters parameters = {kernel_size, stride, dilation, is_causal, scale};
  const int rank = static_cast<int>(kernel_size.size());
  const Dtype dtype = to_dtype(query.scalar_type());
  const Problem problem = check_qk(inputs, parameters);
  Tensor scores = allocate(with_last(query, count_slots(parameters, additional_keys)), query.scalar_type());
  if (problem.batch == 0) return scores;
  const std::optional<Tensor> bias = bias_table(inputs);
  Unfused args = make_unfused(problem, input_view(query, rank), input_view(key, rank), input_view(additional_keys, 1),
                              output_view(scores, rank));
  args.rpb = bias ? bias->const_data_ptr() : nullptr;
  args.hidden = hidden;
  run(unfused_kernels(dtype).score, args);
  return scores;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> na_qk_backward(Tensor grad_scores, Tensor query, Tensor key,
                                                          std::optional<Tensor> rpb,
                                                          std::optional<Tensor> additional_keys,
                                                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                                          std::vector<int64_t> dilation, std::vector<bool> is_causal,
                                                          double scale) {
  const Parameters parameters = {kernel_size, stride, dilation, is_causal, scale};
  const int rank = static_cast<int>(kernel_size.size());
  const ScalarType type = query.scalar_type();
  const Dtype dtype = to_dtype(type);
  const Problem problem = check_qk({query, key, key, rpb, additional_keys, additional_keys}, parameters);
  require_tensor(grad_scores, "grad_scores", type, with_last(query, count_slots(parameters, additional_keys)));
  const Tensor scores = with_contiguous_channels(grad_scores);
  Tensor grad_query = allocate(shape(query), type), grad_key = allocate(shape(key), type);
  Tensor grad_rpb = allocate_gradient(rpb, type), grad_additional_keys = allocate_gradient(additional_keys, type);

  const UnfusedKernels chosen = unfused_kernels(dtype);
  const int64_t offsets = rpb ? rpb->numel() / problem.heads : 0;
  const int64_t parts = problem.batch > 0 ? chosen.parts(problem) : 0;
  std::vector<double> grad_rpb_parts(static_cast<size_t>(problem.heads * parts * offsets));
  if (problem.batch > 0) {
    const View given = input_view(scores, rank), queries = input_view(query, rank);
    run(chosen.sum, make_unfused(problem, output_view(grad_query, rank), input_view(key, rank),
                                 input_view(additional_keys, 1), given));
    run(chosen.transposed_sum, make_unfused(problem, queries, output_view(grad_key, rank), View{}, given));
    if (problem.additional > 0)
      run(chosen.additional_sum, make_unfused(problem, queries, View{}, output_view(grad_additional_keys, 1), given));
    if (rpb) {
      Unfused args = make_unfused(problem, View{}, View{}, View{}, given);
      args.grad_rpb_parts = grad_rpb_parts.data();
      args.parts = parts;
      run(chosen.offset, args);
    }
  }
  sum_parts(grad_rpb_parts, problem.heads, offsets, grad_rpb);
  return {grad_query, grad_key, grad_rpb, grad_additional_keys};
}

Tensor na_av(Tensor weights, Tensor value, std::optional<Tensor> additional_values, std::vector<int64_t> kernel_size,
             std::vector<int64_t> stride, std::vector<int64_t> dilation, std::vector<bool> is_causal) {
  const Parameters parameters = {kernel_size, stride, dilation, is_causal, 1.0};
  const int rank = static_cast<int>(kernel_size.size());
  const Dtype dtype = to_dtype(weights.scalar_type());
  const Problem problem = check_av(weights, value, additional_values, parameters);
  Tensor output = allocate(with_last(weights, problem.value_dim), weights.scalar_type());
  if (problem.batch > 0)
    run(unfused_kernels(dtype).sum, make_unfused(problem, output_view(output, rank), input_view(value, rank),
                                                 input_view(additional_values, 1), input_view(weights, rank)));
  return output;
}

std::tuple<Tensor, Tensor, Tensor> na_av_backward(Tensor grad_output, Tensor weights, Tensor value,
                                                  std::optional<Tensor> additional_values,
                                                  std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                                  std::vector<int64_t> dilation, std::vector<bool> is_causal) {
  const Parameters parameters = {kernel_size, stride, dilation, is_causal, 1.0};
  const int rank = static_cast<int>(kernel_size.size());
  const ScalarType type = weights.scalar_type();
  const Dtype dtype = to_dtype(type);
  const Problem problem = check_av(weights, value, additional_values, parameters);
  require_tensor(grad_output, "grad_output", type, with_last(weights, problem.value_dim));
  const Tensor grad = with_contiguous_channels(grad_output);
  Tensor grad_weights = allocate(shape(weights), type), grad_value = allocate(shape(value), type);
  Tensor grad_additional_values = allocate_gradient(additional_values, type);
  if (problem.batch > 0) {
    const UnfusedKernels chosen = unfused_kernels(dtype);
    const View rows = input_view(grad, rank), given = input_view(weights, rank);
    run(chosen.score, make_unfused(problem, rows, input_view(value, rank), input_view(additional_values, 1),
                                   output_view(grad_weights, rank)));
    run(chosen.transposed_sum, make_unfused(problem, rows, output_view(grad_value, rank), View{}, given));
    if (problem.additional > 0)
      run(chosen.additional_sum, make_unfused(problem, rows, View{}, output_view(grad_additional_values, 1), given));
  }
  return {grad_weights, grad_value, grad_additional_values};
}

}  // namespace
}  // namespace natten2::cpu

STABLE_TORCH_LIBRARY_IMPL(natten2, CPU, unfused) {
  unfused.impl("na_qk", TORCH_BOX(&natten2::cpu::na_qk));
  unfused.impl("na_qk_backward", TORCH_BOX(&natten2::cpu::na_qk_backward));
  unfused.impl("na_av", TORCH_BOX(&natten2::cpu::na_av));
  unfused.impl("na_av_backward", TORCH_BOX(&natten2::cpu::na_av_backward));
}

// The CPU kernels under the operators' names: unpacks tensors, and runs the passes in parallel.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"

namespace natten2::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// Every check that natten2/ops/validation.py makes, which finds better words for what is refused here. PyTorch turns
// the exception into a ValueError.
void require(bool condition, const char* name, const char* rule) {
  if (!condition) throw std::invalid_argument("natten2: " + std::string(name) + " " + rule);
}

Shape shape(const Tensor& tensor) { return Shape(tensor.sizes().begin(), tensor.sizes().end()); }

Dtype to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      throw std::invalid_argument("natten2: query must be float32, float64, bfloat16, or float16");
  }
}

ScalarType accumulate_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

void require_tensor(const Tensor& tensor, const char* name, ScalarType type, const Shape& expected) {
  require(tensor.is_cpu(), name, "must be on the CPU");
  require(tensor.scalar_type() == type, name, "has the wrong dtype");
  require(shape(tensor) == expected, name, "has the wrong shape");
  require(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name, "has no memory");
}

void require_channels(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  require(tensor.stride(last) == 1 || tensor.size(last) == 1, name, "must have a contiguous last axis");
}

// Expanded tensors can be larger than memory, and sizes computed from them must not overflow.
constexpr int64_t kMostAdditional = int64_t{1} << 32;

// A contiguous tensor on the CPU. torch::stable::new_empty goes through the dispatcher, which takes longer than all
// else here.
Tensor allocate(const Shape& shape, ScalarType type) {
  Shape strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * std::max<int64_t>(1, shape[axis]);
  AtenTensorHandle handle = nullptr;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                               aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS) {
    // The stable interface keeps the reason to itself.
    std::string sizes;
    for (const int64_t size : shape) sizes += (sizes.empty() ? "" : ", ") + std::to_string(size);
    throw std::runtime_error("natten2: can't allocate memory for a tensor of shape [" + sizes + "]");
  }
  return Tensor(handle);
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

struct Parameters {
  std::vector<int64_t> kernel_size;
  std::vector<int64_t> stride;
  std::vector<int64_t> dilation;
  std::vector<bool> is_causal;
  double scale;
};

struct Inputs {
  Tensor query;
  Tensor key;
  Tensor value;
  std::optional<Tensor> rpb;
  std::optional<Tensor> additional_keys;
  std::optional<Tensor> additional_values;
};

Problem make_problem(const Inputs& inputs, const Parameters& parameters) {
  const int rank = static_cast<int>(parameters.kernel_size.size());
  require(1 <= rank && rank <= kAxes, "kernel_size", "must have 1 to 3 entries");
  require(parameters.stride.size() == static_cast<size_t>(rank), "stride", "must be as long as kernel_size");
  require(parameters.dilation.size() == static_cast<size_t>(rank), "dilation", "must be as long as kernel_size");
  require(parameters.is_causal.size() == static_cast<size_t>(rank), "is_causal", "must be as long as kernel_size");
  const Tensor& query = inputs.query;
  require(query.dim() == rank + 3 && inputs.key.dim() == rank + 3 && inputs.value.dim() == rank + 3,
          "query, key, value", "must have three axes more than kernel_size has entries");

  Problem problem = {};
  problem.batch = query.size(0);
  problem.heads = query.size(rank + 1);
  problem.head_dim = query.size(rank + 2);
  problem.key_heads = inputs.key.size(rank + 1);
  problem.value_dim = inputs.value.size(rank + 2);
  problem.additional = inputs.additional_keys ? inputs.additional_keys->size(1) : 0;
  problem.scale = parameters.scale;
  const double largest = query.scalar_type() == ScalarType::Double ? std::numeric_limits<double>::max()
                                                                   : std::numeric_limits<float>::max();
  require(std::abs(parameters.scale) <= largest, "scale", "must be finite");
  require(problem.heads > 0 && problem.head_dim > 0, "query", "must have heads and channels");
  require(problem.key_heads > 0 && problem.heads % problem.key_heads == 0, "key",
          "must have a divisor of query's heads");
  require(problem.value_dim > 0, "value", "must have channels");
  require(problem.additional <= kMostAdditional, "additional_keys", "must have at most 2^32 tokens");
  std::fill(std::begin(problem.axes), std::end(problem.axes), Axis{1, 1, 1, 1, false});
  for (int axis = 0; axis < rank; ++axis) {
    const Axis along = {query.size(1 + axis), parameters.kernel_size[axis], parameters.stride[axis],
                        parameters.dilation[axis], parameters.is_causal[axis]};
    require(along.kernel_size >= 1, "kernel_size", "must be at least 1");
    require(1 <= along.stride && along.stride <= along.kernel_size, "stride", "must be from 1 to kernel_size");
    require(along.dilation >= 1, "dilation", "must be at least 1");
    require(along.kernel_size <= along.length / along.dilation, "kernel_size * dilation", "must not exceed the axis");
    problem.axes[kAxes - rank + axis] = along;
  }
  return problem;
}

void require_inputs(const Inputs& inputs, const Problem& problem, int rank) {
  const ScalarType type = inputs.query.scalar_type();
  const Shape query = shape(inputs.query);
  Shape key(query), value(query);
  key[rank + 1] = value[rank + 1] = problem.key_heads;
  value[rank + 2] = problem.value_dim;
  require_tensor(inputs.query, "query", type, query);
  require_tensor(inputs.key, "key", type, key);
  require_tensor(inputs.value, "value", type, value);
  require_channels(inputs.query, "query");
  require_channels(inputs.key, "key");
  require_channels(inputs.value, "value");
  require(inputs.additional_keys.has_value() == inputs.additional_values.has_value(), "additional_keys",
          "must be given with additional_values");
  if (inputs.additional_keys) {
    const Shape tokens = {problem.batch, problem.additional, problem.key_heads};
    Shape keys(tokens), values(tokens);
    keys.push_back(problem.head_dim);
    values.push_back(problem.value_dim);
    require_tensor(*inputs.additional_keys, "additional_keys", type, keys);
    require_tensor(*inputs.additional_values, "additional_values", type, values);
    require_channels(*inputs.additional_keys, "additional_keys");
    require_channels(*inputs.additional_values, "additional_values");
  }
  if (inputs.rpb) {
    Shape offsets = {problem.heads};
    for (int axis = kAxes - rank; axis < kAxes; ++axis) offsets.push_back(2 * problem.axes[axis].kernel_size - 1);
    const ScalarType given = inputs.rpb->scalar_type();
    require(given == type || given == accumulate_type(type), "rpb", "has the wrong dtype");
    require_tensor(*inputs.rpb, "rpb", given, offsets);
  }
}

// The bias as the kernels read it, alive as long as they do.
std::optional<Tensor> bias_table(const Inputs& inputs) {
  if (!inputs.rpb) return std::nullopt;
  const ScalarType type = accumulate_type(inputs.query.scalar_type());
  if (inputs.rpb->scalar_type() == type && inputs.rpb->is_contiguous()) return inputs.rpb;
  return torch::stable::contiguous(torch::stable::to(*inputs.rpb, type));
}

Forward make_forward(const Inputs& inputs, const Problem& problem, int rank, const std::optional<Tensor>& bias,
                     View output, View logsumexp) {
  return {problem,
          input_view(inputs.query, rank),
          input_view(inputs.key, rank),
          input_view(inputs.value, rank),
          input_view(inputs.additional_keys, 1),
          input_view(inputs.additional_values, 1),
          bias ? bias->const_data_ptr() : nullptr,
          output,
          logsumexp};
}

// A large page: the kernels read many rows side by side, each from a small page of its own otherwise.
constexpr size_t kLargePage = size_t{1} << 21;
constexpr std::align_val_t kScratchAlignment{kLargePage};

struct FreeScratch {
  void operator()(void* memory) const { ::operator delete(memory, kScratchAlignment); }
};

// Scratch memory of one thread. What is small is kept for the next call: the system takes longer to map fresh memory
// than a small problem takes.
class ThreadScratch {
 public:
  // Null where there is not enough memory.
  void* get(size_t bytes) {
    if (bytes <= size_) return memory_.get();
    // The page that it ends in is all its own.
    if (bytes > kSmall) bytes = (bytes + kLargePage - 1) / kLargePage * kLargePage;
    memory_.reset();
    memory_.reset(::operator new(bytes, kScratchAlignment, std::nothrow));
    size_ = memory_ ? bytes : 0;
#ifdef __linux__
    // Only a wish: whether it is granted changes nothing but the time.
    if (memory_ && bytes > kSmall) madvise(memory_.get(), bytes, MADV_HUGEPAGE);
#endif
    return memory_.get();
  }

  void release() {
    if (size_ <= kMostKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr size_t kSmall = size_t{1} << 17, kMostKept = size_t{1} << 22;

  std::unique_ptr<void, FreeScratch> memory_;
  size_t size_ = 0;
};

template <class Arguments>
void run(const Pass<Arguments>& pass, const Arguments& args) {
  // Threads pay off from about this much work on.
  constexpr int64_t kWorkPerThread = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, pass.work(args)));
  const size_t bytes = static_cast<size_t>(pass.scratch_bytes(args));
  std::atomic<bool> out_of_memory = false;
  torch::stable::parallel_for(0, pass.count(args), grain, [&](int64_t begin, int64_t end) {
    thread_local ThreadScratch scratch;
    if (void* memory = scratch.get(bytes))
      pass.run(args, begin, end, memory);
    else
      out_of_memory = true;
    scratch.release();
  });
  if (out_of_memory) throw std::runtime_error("natten2: can't allocate " + std::to_string(bytes) + " bytes of memory");
}

// The views of [batch, *axes, 3, heads, head_dim].
std::array<Tensor, 3> unpack(const Tensor& packed, const Parameters& parameters) {
  const int64_t axis = static_cast<int64_t>(parameters.kernel_size.size()) + 1;
  require(packed.dim() == axis + 3 && packed.size(axis) == 3, "qkv",
          "must have shape [batch, *axes, 3, heads, head_dim]");
  return {torch::stable::select(packed, axis, 0), torch::stable::select(packed, axis, 1),
          torch::stable::select(packed, axis, 2)};
}

Inputs unpack_inputs(const Tensor& qkv, const std::optional<Tensor>& rpb, const Parameters& parameters) {
  const auto [query, key, value] = unpack(qkv, parameters);
  return {query, key, value, rpb, std::nullopt, std::nullopt};
}

std::tuple<Tensor, Tensor> forward(const Inputs& inputs, const Parameters& parameters) {
  const int rank = static_cast<int>(parameters.kernel_size.size());
  const ScalarType type = inputs.query.scalar_type();
  const Dtype dtype = to_dtype(type);
  const Problem problem = make_problem(inputs, parameters);
  require_inputs(inputs, problem, rank);

  Shape rows = shape(inputs.query);
  rows.pop_back();
  Shape channels(rows);
  channels.push_back(problem.value_dim);
  Tensor output = allocate(channels, type);
  Tensor logsumexp = allocate(rows, accumulate_type(type));
  if (problem.batch == 0) return {output, logsumexp};
  const std::optional<Tensor> bias = bias_table(inputs);
  run(kernels(dtype, problem).forward,
      make_forward(inputs, problem, rank, bias, output_view(output, rank), output_view(logsumexp, rank)));
  return {output, logsumexp};
}

// Sums the parts [heads, parts, offsets] of the bias's gradient.
template <class Number>
void sum_parts(const std::vector<double>& parts, int64_t heads, int64_t offsets, void* out) {
  if (offsets == 0) return;
  const int64_t count = static_cast<int64_t>(parts.size()) / heads / offsets;
  std::vector<double> sum(static_cast<size_t>(offsets));
  auto part = parts.begin();
  for (int64_t head = 0; head < heads; ++head) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t p = 0; p < count; ++p)
      for (double& entry : sum) entry += *part++;
    for (int64_t i = 0; i < offsets; ++i) static_cast<Number*>(out)[head * offsets + i] = static_cast<Number>(sum[i]);
  }
}

void sum_parts(const std::vector<double>& parts, int64_t heads, int64_t offsets, const Tensor& out) {
  void* data = out.mutable_data_ptr();
  switch (to_dtype(out.scalar_type())) {
    case Dtype::kFloat:
      return sum_parts<float>(parts, heads, offsets, data);
    case Dtype::kDouble:
      return sum_parts<double>(parts, heads, offsets, data);
    case Dtype::kBFloat16:
      return sum_parts<torch::headeronly::BFloat16>(parts, heads, offsets, data);
    case Dtype::kHalf:
      return sum_parts<torch::headeronly::Half>(parts, heads, offsets, data);
  }
}

struct Upstream {
  Tensor grad_output;
  std::optional<Tensor> grad_logsumexp;
  Tensor output;
  Tensor logsumexp;
};

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor allocate_like(const Tensor& input) { return allocate(shape(input), input.scalar_type()); }

// Of an absent input, size 0.
Tensor allocate_like(const std::optional<Tensor>& input, ScalarType type) {
  return input ? allocate_like(*input) : allocate({0}, type);
}

// `allocate_grads` makes the gradients of query, key, and value, once all arguments are known to be right.
template <class AllocateGrads>
SixTensors backward(const Upstream& upstream, const Inputs& inputs, const Parameters& parameters,
                    const AllocateGrads& allocate_grads) {
  const int rank = static_cast<int>(parameters.kernel_size.size());
  const ScalarType type = inputs.query.scalar_type(), accumulate = accumulate_type(type);
  const Dtype dtype = to_dtype(type);
  const Problem problem = make_problem(inputs, parameters);
  require_inputs(inputs, problem, rank);
  Shape rows = shape(inputs.query);
  rows.pop_back();
  Shape channels(rows);
  channels.push_back(problem.value_dim);
  auto [grad_output, grad_logsumexp, output, logsumexp] = upstream;
  require_tensor(output, "output", type, channels);
  require_channels(output, "output");
  require_tensor(grad_output, "grad_output", type, channels);
  require_tensor(logsumexp, "logsumexp", accumulate, rows);
  if (grad_logsumexp) require_tensor(*grad_logsumexp, "grad_logsumexp", accumulate, rows);
  // Gradients come as autograd made them, expanded from one number even.
  if (problem.value_dim != 1 && grad_output.stride(rank + 2) != 1) grad_output = torch::stable::contiguous(grad_output);

  const auto [grad_query, grad_key, grad_value] = allocate_grads();
  Tensor grad_rpb = allocate_like(inputs.rpb, type);
  Tensor grad_additional_keys = allocate_like(inputs.additional_keys, type);
  Tensor grad_additional_values = allocate_like(inputs.additional_values, type);
  Tensor delta = allocate(rows, accumulate);
  const Kernels chosen = kernels(dtype, problem);
  const int64_t offsets = inputs.rpb ? inputs.rpb->numel() / problem.heads : 0;
  const int64_t parts = problem.batch > 0 ? chosen.parts(problem) : 0;
  std::vector<double> grad_rpb_parts(static_cast<size_t>(problem.heads * parts * offsets));

  const std::optional<Tensor> bias = bias_table(inputs);
  const Backward args = {
      make_forward(inputs, problem, rank, bias, input_view(output, rank), input_view(logsumexp, rank)),
      input_view(grad_output, rank),
      input_view(grad_logsumexp, rank),
      output_view(grad_query, rank),
      output_view(grad_key, rank),
      output_view(grad_value, rank),
      inputs.additional_keys ? output_view(grad_additional_keys, 1) : View{},
      inputs.additional_values ? output_view(grad_additional_values, 1) : View{},
      output_view(delta, rank),
      inputs.rpb ? grad_rpb_parts.data() : nullptr,
      parts};
  if (problem.batch > 0)
    for (int i = 0; i < chosen.passes; ++i) run(chosen.backward[i], args);
  sum_parts(grad_rpb_parts, problem.heads, offsets, grad_rpb);
  return {grad_query, grad_key, grad_value, grad_rpb, grad_additional_keys, grad_additional_values};
}

std::tuple<Tensor, Tensor> na_forward(Tensor query, Tensor key, Tensor value, std::optional<Tensor> rpb,
                                      std::optional<Tensor> additional_keys, std::optional<Tensor> additional_values,
                                      std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                      std::vector<int64_t> dilation, std::vector<bool> is_causal, double scale) {
  return forward({query, key, value, rpb, additional_keys, additional_values},
                 {kernel_size, stride, dilation, is_causal, scale});
}

std::tuple<Tensor, Tensor> na_qkv_forward(Tensor qkv, std::optional<Tensor> rpb, std::vector<int64_t> kernel_size,
                                          std::vector<int64_t> stride, std::vector<int64_t> dilation,
                                          std::vector<bool> is_causal, double scale) {
  const Parameters parameters = {kernel_size, stride, dilation, is_causal, scale};
  return forward(unpack_inputs(qkv, rpb, parameters), parameters);
}

SixTensors na_backward(Tensor grad_output, std::optional<Tensor> grad_logsumexp, Tensor query, Tensor key, Tensor value,
                       std::optional<Tensor> rpb, std::optional<Tensor> additional_keys,
                       std::optional<Tensor> additional_values, Tensor output, Tensor logsumexp,
                       std::vector<int64_t> kernel_size, std::vector<int64_t> stride, std::vector<int64_t> dilation,
                       std::vector<bool> is_causal, double scale) {
  const Inputs inputs = {query, key, value, rpb, additional_keys, additional_values};
  return backward({grad_output, grad_logsumexp, output, logsumexp}, inputs,
                  {kernel_size, stride, dilation, is_causal, scale},
                  [&] { return std::array{allocate_like(query), allocate_like(key), allocate_like(value)}; });
}

std::tuple<Tensor, Tensor> na_qkv_backward(Tensor grad_output, std::optional<Tensor> grad_logsumexp, Tensor qkv,
                                           std::optional<Tensor> rpb, Tensor output, Tensor logsumexp,
                                           std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                           std::vector<int64_t> dilation, std::vector<bool> is_causal, double scale) {
  const Parameters parameters = {kernel_size, stride, dilation, is_causal, scale};
  Tensor grad_qkv;
  const SixTensors grads =
      backward({grad_output, grad_logsumexp, output, logsumexp}, unpack_inputs(qkv, rpb, parameters), parameters, [&] {
        grad_qkv = allocate_like(qkv);
        return unpack(grad_qkv, parameters);
      });
  return {grad_qkv, std::get<3>(grads)};
}

}  // namespace
}  // namespace natten2::cpu

STABLE_TORCH_LIBRARY_IMPL(natten2, CPU, m) {
  m.impl("na_forward", TORCH_BOX(&natten2::cpu::na_forward));
  m.impl("na_backward", TORCH_BOX(&natten2::cpu::na_backward));
  m.impl("na_qkv_forward", TORCH_BOX(&natten2::cpu::na_qkv_forward));
  m.impl("na_qkv_backward", TORCH_BOX(&natten2::cpu::na_qkv_backward));
}

#include "bind_unfused.h"

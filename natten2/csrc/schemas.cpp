// The schemas of the operators that compiled programs call, for processes without Python; in Python ops/schemas.py
// defines them.
#include <torch/csrc/stable/library.h>

#define NATTEN2_INPUTS \
  "Tensor query, Tensor key, Tensor value, Tensor? rpb, Tensor? additional_keys, Tensor? additional_values"
#define NATTEN2_PARAMETERS "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale"

STABLE_TORCH_LIBRARY(natten2, m) {
  m.def("na_forward(" NATTEN2_INPUTS ", " NATTEN2_PARAMETERS ") -> (Tensor output, Tensor logsumexp)");
  m.def("na_backward(Tensor grad_output, Tensor? grad_logsumexp, " NATTEN2_INPUTS
        ", Tensor output, Tensor logsumexp, " NATTEN2_PARAMETERS
        ") -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rpb, "
        "Tensor grad_additional_keys, Tensor grad_additional_values)");
}

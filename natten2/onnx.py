"""Export to ONNX, as nodes of the standard operator set that every runtime has.

```python
table = natten2.onnx.translation_table()
torch.onnx.export(model, (x,), "model.onnx", dynamo=True, custom_translation_table=table)
```

The batch may be dynamic; the axes are constants of the graph, as the windows' indices are. `pip install natten2[onnx]`
installs what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from natten2.ops.reference import window_slots
from natten2.ops.schemas import na_forward

# A value of the graph that is being built, of onnxscript's, which is imported only when it is needed.
Value: TypeAlias = Any

__all__ = ["translation_table"]


def translation_table() -> dict[Callable[..., object], Callable[..., object]]:
    """What `torch.onnx.export` takes as `custom_translation_table`.

    Raises:
        ImportError: `onnx` or `onnxscript` is missing.
    """
    import onnxscript  # noqa: F401

    return {na_forward: _na_forward}


def _na_forward(
    query: Value,
    key: Value,
    value: Value,
    rpb: Value | None,
    additional_keys: Value | None,
    additional_values: Value | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Value, Value]:
    """`natten2.ops.reference.na_forward`, in ONNX."""
    import onnx_ir
    from onnxscript import opset18 as op

    _, *sizes, heads, channels = query.shape
    spatial = _known("axes", sizes)
    heads, channels, key_heads, value_channels = _known("heads and channels", (heads, channels, *value.shape[-2:]))
    slots = window_slots(spatial, kernel_size, stride, dilation, is_causal, torch.device("cpu"))
    tokens, width = slots.token.shape
    is_half = query.dtype in (onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16)

    def constant(array: np.ndarray) -> Value:
        return op.Constant(value=onnx_ir.serde.serialize_tensor(onnx_ir.tensor(array)))

    def widened(x: Value) -> Value:
        return op.Cast(x, to=onnx_ir.DataType.FLOAT) if is_half else x

    def gathered(x: Value, size: int) -> Value:
        grid = op.Reshape(widened(x), constant(np.array([0, tokens, key_heads, size])))
        return op.Gather(grid, constant(slots.token.numpy()), axis=1)

    grouped = constant(np.array([0, tokens, key_heads, heads // key_heads, channels]))
    query_rows = op.Reshape(widened(query), grouped)
    factor = op.CastLike(constant(np.array(scale)), query_rows)
    scores = op.Mul(op.Einsum(query_rows, gathered(key, channels), equation="bthgd,btshd->bthgs"), factor)
    if rpb is not None:
        table = op.Reshape(op.CastLike(rpb, query_rows), constant(np.array([heads, -1])))
        bias = op.Gather(table, constant(slots.offset.numpy()), axis=1)
        bias = op.Reshape(bias, constant(np.array([key_heads, heads // key_heads, tokens, width])))
        scores = op.Add(scores, op.Transpose(bias, perm=[2, 0, 1, 3]))
    if not slots.visible.all():
        visible = constant(slots.visible[:, None, None].numpy())
        scores = op.Where(visible, scores, op.CastLike(constant(np.array(-np.inf)), query_rows))
    values = [("bthgs,btshd->bthgd", gathered(value, value_channels))]
    if additional_keys is not None:
        extra = op.Einsum(query_rows, widened(additional_keys), equation="bthgd,bnhd->bthgn")
        scores = op.Concat(scores, op.Mul(extra, factor), axis=-1)
        values.append(("bthgn,bnhd->bthgd", widened(additional_values)))

    last = constant(np.array([-1]))
    largest = op.ReduceMax(scores, last)
    exponentials = op.Exp(op.Sub(scores, largest))
    total = op.ReduceSum(exponentials, last)
    weights = op.Div(exponentials, total)
    bounds = (0, width, np.iinfo(np.int64).max)
    output = None
    for index, (equation, rows) in enumerate(values):
        begin, end = (constant(np.array([bound])) for bound in bounds[index : index + 2])
        part = op.Einsum(op.Slice(weights, begin, end, last), rows, equation=equation)
        output = part if output is None else op.Add(output, part)
    logsumexp = op.Add(largest, op.Log(total))
    shape = [0, *spatial, heads]
    return (
        op.CastLike(op.Reshape(output, constant(np.array([*shape, value_channels]))), query),
        op.Reshape(logsumexp, constant(np.array(shape))),
    )


def _known(name: str, sizes: Sequence[object]) -> tuple[int, ...]:
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(f"query's {name} must not be dynamic in ONNX, got {list(map(str, sizes))}")
    return tuple(sizes)

"""An Inductor pass for models that others wrote: queries, keys, and values cut from one projection are packed again.

Such a model hands the operator three views, and autograd then copies their three gradients into the projection's. The
pass hands over the projection itself. It runs before autograd, so that the backward graph follows from the forward.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from natten2.ops.composite import default_scale
from natten2.ops.schemas import MAX_RANK, na_forward, na_qkv_forward

__all__ = ["PackProjections"]

_OPERATORS = (na_forward, *(getattr(torch.ops.natten2, f"na{rank}d").default for rank in range(1, MAX_RANK + 1)))
_WINDOW = ("kernel_size", "stride", "dilation", "is_causal")
# Functions and methods that may return a view, whose gradient is then a view's: not `detach`, nor a function of others.
_VIEWS = frozenset(
    (
        "chunk",
        "contiguous",
        "flatten",
        "getitem",
        "moveaxis",
        "movedim",
        "narrow",
        "permute",
        "reshape",
        "select",
        "split",
        "split_with_sizes",
        "squeeze",
        "swapaxes",
        "swapdims",
        "tensor_split",
        "to",
        "transpose",
        "type_as",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
        "view_as",
    )
)


class PackProjections(CustomGraphPass):
    """The pass; :func:`natten2.compile_options` says what it does."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            arguments = _arguments(node)
            if arguments is not None:
                _pack(graph, node, *arguments)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _arguments(node: fx.Node) -> tuple[torch._ops.OpOverload, dict[str, object]] | None:
    """The operator that a node calls, and its arguments by name, if it is neighborhood attention."""
    # Dynamo keeps the name as it was called, with or without the overload.
    overload = getattr(node.target, "default", node.target)
    if node.op != "call_function" or overload not in _OPERATORS:
        return None
    names = [argument.name for argument in overload._schema.arguments]
    arguments = {argument.name: argument.default_value for argument in overload._schema.arguments}
    return overload, arguments | dict(zip(names, node.args, strict=False)) | node.kwargs


def _pack(graph: fx.Graph, node: fx.Node, overload: torch._ops.OpOverload, arguments: dict[str, object]) -> None:
    views = [arguments.pop(name) for name in ("query", "key", "value")]
    additional = [arguments.pop(name) for name in ("additional_keys", "additional_values")]
    if additional != [None, None] or not all(isinstance(view, fx.Node) for view in views):
        return
    projection = _find_projection(views)
    if projection is None:
        return
    query = _value(views[0])
    rank = query.dim() - 3
    if arguments["scale"] is None:
        arguments["scale"] = default_scale(query)
    # The faces take one number for all axes.
    for name in _WINDOW:
        if not isinstance(arguments[name], Sequence):
            arguments[name] = [arguments[name]] * rank
    with graph.inserting_before(node):
        sizes = [_size(graph, views[0], axis) for axis in range(rank + 3)]
        packed = graph.call_method("view", (projection, *sizes[:-2], 3, *sizes[-2:]))
        names = [argument.name for argument in na_qkv_forward._schema.arguments[1:]]
        result = graph.call_function(na_qkv_forward, (packed, *(arguments[name] for name in names)))
        if overload is not na_forward:
            result = graph.call_function(operator.getitem, (result, 0))
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _find_projection(views: Sequence[fx.Node]) -> fx.Node | None:
    """The tensor that can be viewed as `[B, *S, 3, H, D]` with the three views side by side, if there is one."""
    query, key, value = map(_value, views)
    if not all(map(_is_plain, (query, key, value))) or not isinstance(query.shape[-1], int):
        return None
    step = key.storage_offset() - query.storage_offset()
    shape = (*query.shape[:-2], 3, *query.shape[-2:])
    strides = (*query.stride()[:-2], step, *query.stride()[-2:])
    alike = all(
        _equal((*x.shape, *x.stride()), (*query.shape, *query.stride())) and x.requires_grad == query.requires_grad
        for x in (key, value)
    )
    if not alike or not _equal((value.storage_offset() - key.storage_offset(),), (step,)):
        return None
    others = [set(_ancestors(view)) for view in views[1:]]
    for node in _ancestors(views[0]):
        if all(node in ancestors for ancestors in others) and _is_viewed_as(_value(node), query, shape, strides):
            return node
    return None


def _is_plain(tensor: object) -> bool:
    is_dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided
    return is_dense and not is_traceable_wrapper_subclass(tensor)


def _is_viewed_as(tensor: Tensor, query: Tensor, shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the tensor's numbers, in order, are those of a view that starts where the query does."""
    if tensor.requires_grad != query.requires_grad or tensor.dtype != query.dtype:
        return False
    mine, wanted = _runs(tensor.shape, tensor.stride()), _runs(shape, strides)
    return _equal((tensor.storage_offset(), *mine), (query.storage_offset(), *wanted))


def _runs(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Sizes and strides, innermost first, with axes made one that a view may flatten."""
    runs: list[int] = []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if _equal((size,), (1,)):
            continue
        if runs and _equal((stride,), (runs[-2] * runs[-1],)):
            runs[-2] *= size
        else:
            runs += (size, stride)
    return runs


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """A node and what it is a view of, nearest first."""
    while node is not None and isinstance(_value(node), Tensor):
        yield node
        node = _parent(node)


def _parent(node: fx.Node) -> fx.Node | None:
    source = node
    # One view of several is taken out of a tuple first.
    while source is node or (source is not None and not isinstance(_value(source), Tensor)):
        name = source.target if source.op == "call_method" else getattr(source.target, "__name__", None)
        is_view = source.op in ("call_method", "call_function") and name in _VIEWS
        source = source.args[0] if is_view and source.args and isinstance(source.args[0], fx.Node) else None
    is_shared = source is not None and _value(source).untyped_storage()._cdata == _value(node).untyped_storage()._cdata
    return source if is_shared else None


def _value(node: fx.Node) -> object:
    """The tensor, without data, that a node stood for when it was traced."""
    return node.meta.get("example_value", node.meta.get("val"))


def _equal(left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether numbers are equal for every size of the dynamic axes."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def _size(graph: fx.Graph, node: fx.Node, axis: int) -> int | fx.Node:
    size = _value(node).shape[axis]
    return size if isinstance(size, int) else graph.call_method("size", (node, axis))

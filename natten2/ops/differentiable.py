"""Attaches a derivative rule to an operator, at the dispatcher's Autograd key.

`torch.library.register_autograd` raises under `torch.func` and gives zero tangents in forward mode without a word; a
rule attached here works in eager autograd, `torch.func`, `torch.compile`, and export alike. This is the only file that
touches private names of torch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import _C, Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from natten2.ops.validation import CHECKS, call_backend

__all__ = ["register_differentiable"]


def register_differentiable(
    library: torch.library.Library, op: torch._ops.OpOverload, rule: type, formula: Callable[..., tuple[Tensor, ...]]
) -> None:
    """Makes `op` differentiable.

    Args:
        library: The library that defines `op`.
        op: The operator.
        rule: A class with the static methods `setup_context` and `backward` of `torch.autograd.Function`.
        formula: `op` in plain PyTorch, which takes its place where an argument carries a tangent: so forward mode, and
            forward mode of forward mode, which PyTorch gets wrong for a rule, are PyTorch's own.
    """

    def forward(keyset: _C.DispatchKeySet | None, *args: object) -> object:
        # The keys that are left, unless levels of torch.func are: a second call would take as long as a small problem.
        if keyset is not None:
            return call_backend(op, keyset, *args)
        # The node switches both differentiation modes off; the outer levels of torch.func still need them on.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
            return op(*args)

    def setup_context(ctx, inputs: tuple[object, ...], output: object) -> None:
        rule.setup_context(ctx, inputs[1:], output)

    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *rule.backward(ctx, *grads)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
    }
    node = type(rule.__name__, (_SingleLevelFunction,), members)

    def kernel(keyset: _C.DispatchKeySet, *args: object) -> object:
        is_transformed = _C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        # The compiler, which runs under modes of dispatch, enters levels of forward mode that forward_ad doesn't know.
        is_traced = _C._len_torch_dispatch_stack() > 0
        if (is_transformed or is_traced) and _have_tangents(args, is_traced):
            CHECKS[op](*args)
            return formula(*args)
        if is_transformed:
            with enable_single_level_autograd_function():
                return node.apply(None, *args)
        keyset = keyset & _C._after_autograd_keyset
        if not (_C.is_grad_enabled() and _C._any_requires_grad(*args)):
            return call_backend(op, keyset, *args)
        return node.apply(keyset, *args)

    library.impl(op._schema.name, kernel, "Autograd", with_keyset=True)


def _have_tangents(values: tuple[object, ...], is_traced: bool) -> bool:
    if not is_traced:
        return any(map(_has_tangent, values))
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    # To look at a tensor is an operation, which has no place in the graph.
    with disable_proxy_modes_tracing():
        return any(map(_has_tangent, values))


def _has_tangent(value: object) -> bool:
    # Level 0 is the only one there is.
    return isinstance(value, Tensor) and torch._VF._unpack_dual(value, level=0).tangent is not None

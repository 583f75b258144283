"""Attaches a derivative rule to an operator, at the dispatcher's Autograd key.

`torch.library.register_autograd` raises under `torch.func` and gives zero tangents in forward mode without a word; a
rule attached here works in eager autograd, `torch.func`, `torch.compile`, and export alike. This is the only file that
touches private names of torch's autograd.
"""

from __future__ import annotations

import torch
from torch import _C
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from natten2.ops.validation import call_backend

__all__ = ["register_differentiable"]


def register_differentiable(library: torch.library.Library, op: torch._ops.OpOverload, rule: type) -> None:
    """Makes `op` differentiable.

    Args:
        library: The library that defines `op`.
        op: The operator.
        rule: A class with the static methods `setup_context` and `backward` of `torch.autograd.Function`; also `jvp`
            for forward derivatives, which raise without it, and `vmap` as `torch.library.register_vmap` takes it,
            without which `torch.vmap` loops.

    Nested forward derivatives raise: PyTorch would give wrong numbers without a word.
    """

    def forward(*args: object) -> object:
        # The node switches both differentiation modes off; the outer levels of torch.func still need them on.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
            return op(*args)

    members = {
        "forward": staticmethod(forward),
        "_compiled_autograd_key": staticmethod(torch.autograd.Function._compiled_autograd_key),
    }
    node = type(rule.__name__, (rule, _SingleLevelFunction), members)

    def kernel(keyset: _C.DispatchKeySet, *args: object) -> object:
        if not _needs_node(args):
            return call_backend(op, keyset & _C._after_autograd_keyset, *args)
        if hasattr(rule, "jvp"):
            _refuse_nested_forward_mode()
        with enable_single_level_autograd_function():
            return node.apply(*args)

    library.impl(op._schema.name, kernel, "Autograd", with_keyset=True)
    if hasattr(rule, "vmap"):
        torch.library.register_vmap(op._name, rule.vmap, lib=library)


def _needs_node(args: tuple[object, ...]) -> bool:
    if _C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return _C.is_grad_enabled() and _C._any_requires_grad(*args)


def _refuse_nested_forward_mode() -> None:
    interpreters = retrieve_all_functorch_interpreters() if _C._are_functorch_transforms_active() else []
    if sum(interpreter.key() == _C._functorch.TransformType.Jvp for interpreter in interpreters) > 1:
        raise NotImplementedError("natten2 has no nested forward-mode derivatives: take the inner ones in reverse mode")

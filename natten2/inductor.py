"""What `torch.compile` can be told about models that others wrote."""

from __future__ import annotations

__all__ = ["compile_options"]


def compile_options() -> dict[str, object]:
    """Options for `torch.compile(model, options=...)` that pack what a model has split.

    Calls of the operator on queries, keys, and values that are views of one tensor `[B, *S, 3, H, D]` become calls of
    `natten2::na_qkv_forward` on that tensor, in whichever way they were cut from it; their gradients need no copy then.
    Other calls stay as they are.
    """
    # Importing Inductor takes as long as importing torch.
    from natten2.ops.passes import PackProjections

    return {"pre_grad_custom_pass": PackProjections()}

"""The operators `torch.ops.natten2.*`: schemas, checks, fake kernels, derivatives, and kernels in Python."""

from natten2.ops import (
    autocast,
    autograd,
    composite,
    cuda,
    fake,
    fallback,
    flops,
    reference,
    schemas,
    subclasses,
    torchscript,
    validation,
    vmap,
)

__all__ = [
    "autocast",
    "autograd",
    "composite",
    "cuda",
    "fake",
    "fallback",
    "flops",
    "reference",
    "schemas",
    "subclasses",
    "torchscript",
    "validation",
    "vmap",
]

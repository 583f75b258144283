"""The operators `torch.ops.natten2.*`: schemas, checks, fake kernels, derivatives, and kernels in Python."""

from natten2.ops import (
    autocast,
    autograd,
    bilinear,
    composite,
    cuda,
    fake,
    fallback,
    flops,
    jagged,
    reference,
    schemas,
    subclasses,
    torchscript,
    unfused_reference,
    validation,
    vmap,
)

__all__ = [
    "autocast",
    "autograd",
    "bilinear",
    "composite",
    "cuda",
    "fake",
    "fallback",
    "flops",
    "jagged",
    "reference",
    "schemas",
    "subclasses",
    "torchscript",
    "unfused_reference",
    "validation",
    "vmap",
]

"""The operators `torch.ops.natten2.*`: schemas, checks, fake kernels, derivatives, and kernels in Python."""

from natten2.ops import (
    autocast,
    autograd,
    composite,
    cuda,
    fake,
    fallback,
    jagged,
    reference,
    schemas,
    subclasses,
    validation,
)

__all__ = [
    "autocast",
    "autograd",
    "composite",
    "cuda",
    "fake",
    "fallback",
    "jagged",
    "reference",
    "schemas",
    "subclasses",
    "validation",
]

"""The reference as the kernel of a device that has none of its own."""

from natten2.ops import reference
from natten2.ops.schemas import LIBRARY

LIBRARY.impl("na_forward", reference.na_forward, "MPS")
LIBRARY.impl("na_backward", reference.na_backward, "MPS")

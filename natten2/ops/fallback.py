"""The reference as the kernel of devices that have none of their own."""

from natten2.ops import reference
from natten2.ops.schemas import LIBRARY

for _device in ("MPS", "XPU"):
    LIBRARY.impl("na_forward", reference.na_forward, _device)
    LIBRARY.impl("na_backward", reference.na_backward, _device)

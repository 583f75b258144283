"""The reference as the kernel of a device that has none of its own."""

from natten2.ops import reference
from natten2.ops.schemas import LIBRARY

for _name in reference.__all__:
    LIBRARY.impl(_name, getattr(reference, _name), "MPS")

"""The reference as the kernel of a device that has none of its own."""

from natten2.ops import reference, unfused_reference
from natten2.ops.schemas import LIBRARY

for _module in (reference, unfused_reference):
    for _name in _module.__all__:
        LIBRARY.impl(_name, getattr(_module, _name), "MPS")

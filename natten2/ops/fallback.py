"""The reference as the kernel of a device that has none of its own."""

from natten2.ops import reference, unfused_reference
from natten2.ops.schemas import LIBRARY
from natten2.ops.validation import CHECKS

_FORMULAS = vars(reference) | vars(unfused_reference)

for _op in CHECKS:
    _name = _op._schema.name
    LIBRARY.impl(_name, _FORMULAS[_name.removeprefix("natten2::")], "MPS")

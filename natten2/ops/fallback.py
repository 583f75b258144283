"""The reference as the kernel of a device that has none of its own."""

from natten2.ops import reference, unfused_reference
from natten2.ops.schemas import LIBRARY
from natten2.ops.validation import CHECKS

_FORMULAS = vars(reference) | vars(unfused_reference)

for _op in CHECKS:
    LIBRARY.impl(_op._schema.name, _FORMULAS[_op._schema.name], "MPS")

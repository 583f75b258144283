"""docs/support.md is what the tests show; `python tests/test_support.py` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import test_accounting
import test_autograd
import test_compile
import test_distributed
import test_export
import test_functional
import test_nested
import test_operators
import test_sharding
import test_transforms
from test_transforms import OPERATORS, RAISES, TRANSFORMS, UNSURE

from natten2.ops.validation import CHECKS

FILE = Path(__file__).parent.parent / "docs" / "support.md"
HEAD = """\
# What PyTorch can do with the operators

Each cell is a test that compares numbers with the reference's in float64, or that sees the error raised. `na1d`,
`na2d`, `na3d`, the modules, and the models are faces of `na_forward`, so what holds for it holds for them. This page is
written by `python tests/test_support.py`, and a test compares it with the tests that there are.

## Derivatives and `torch.func`

They are those of every input, the bias and the additional keys among them, through all outputs. Each cell is a test of
each of `na_forward`, `na_qkv_forward`, `na_qk`, `na_av`, and of their gradients `na_backward`, `na_qkv_backward`,
`na_qk_backward`, `na_av_backward`. What *raises* does so in PyTorch itself, for the reference's plain operators too.
"""
NOTE = """
Reverse mode runs kernels, that of `na_qk` and `na_av` to any order; forward mode, and second derivatives of the others,
run the reference, in memory linear in the number of tokens. *Compiled* is the function alone in the first three rows,
and the transform as a whole in the others: `torch.func` does not go through compiled functions. Nested forward mode
compiles or raises, depending on the function and on what the process compiled before; so does forward mode after a
failure of it, or of `vmap` of `hessian`. Numbers are right wherever there are any.

## Everything else
"""
# What, the module and the name of its test, and what it shows.
FURTHER = (
    ("vmap over some inputs, a bias for each index among them", test_transforms, "vmap_of_some_inputs"),
    ("vmap over modules, gradients per sample", test_transforms, "an_ensemble_of_modules_with_biases_of_their_own"),
    ("autocast", test_functional, "autocast_follows_the_active_dtype"),
    ("forward mode under autocast", test_transforms, "forward_mode_under_autocast"),
    ("`gradcheck`", test_autograd, "gradcheck"),
    ("`gradgradcheck`", test_autograd, "gradgradcheck"),
    ("`opcheck`, all of its utilities", test_operators, "opcheck_forward"),
    ("`FlopCounterMode`, eager, on meta tensors, around compiled calls", test_accounting, "flop_counter"),
    ("`FlopCounterMode` of exported programs", test_accounting, "flops_of_an_exported_program"),
    ("checkpointing, selective too", test_accounting, "checkpointing_repeats_what_the_policy_does_not_keep"),
    ("the same, compiled", test_accounting, "compiled_checkpointing_repeats_what_the_policy_does_not_keep"),
    ("`torch.compile`, one graph, dynamic sizes or not", test_compile, "a_block_compiles_into_one_graph"),
    ("no recompilation for another batch or size", test_compile, "a_new_batch_or_image_size_compiles_nothing"),
    ("compiled autograd", test_compile, "compiled_autograd_of_an_eager_forward"),
    ("compiled autocast", test_compile, "compiled_autocast_is_eager_autocast"),
    ("`cpp_wrapper`", test_compile, "the_cpp_wrapper_calls_the_operator"),
    ("compile caches, hit by a second process", test_compile, "a_second_process_compiles_nothing"),
    ("`torch.export`, dynamic batch, height, and width", test_export, "export_with_dynamic_sizes"),
    ("AOTInductor on the CPU, the same sizes dynamic", test_export, "a_package_of_aotinductor"),
    ("the package in a C++ program without Python", test_export, "a_program_without_python_runs_the_package"),
    ("ONNX, dynamic batch, in onnxruntime", test_export, "onnx"),
    ("`DTensor`, FSDP2, DDP, tensor parallelism", test_sharding, "four_processes_give_what_one_gives"),
    ("context parallelism", test_distributed, "four_processes_give_what_one_gives"),
    ("jagged nested tensors", test_nested, "one_ragged_axis"),
    ("jagged nested tensors through modules", test_nested, "modules"),
    ("`torch.jit.trace`, `torch.jit.script`", test_export, "torchscript_raises"),
)


def page() -> str:
    return "\n".join((HEAD, *transforms(), NOTE, *further(), ""))


def transforms() -> Iterator[str]:
    yield "| | eager | compiled |"
    yield "| --- | --- | --- |"
    for name in TRANSFORMS:
        yield f"| {name} | {outcome(name, 'eager')} | {outcome(name, 'compiled')} |"


def outcome(name: str, mode: str) -> str:
    if (name, mode) not in RAISES:
        return "works"
    return "raises or works" if name in UNSURE else "raises"


def further() -> Iterator[str]:
    yield "| | | test |"
    yield "| --- | --- | --- |"
    for what, module, name in FURTHER:
        test = getattr(module, f"test_{name}")
        result = "raises" if name.endswith("raises") else "works"
        yield f"| {what} | {result} | `{module.__name__}.{test.__name__}` |"


def test_the_page_is_what_the_tests_show():
    assert FILE.read_text() == page(), "run python tests/test_support.py"


def test_every_cell_is_a_test():
    tested = {tuple(cell.values) for cell in test_transforms.cells()}
    assert tested == set(product(TRANSFORMS, OPERATORS, ("eager", "compiled")))
    assert set(OPERATORS) == {op._opname for op in CHECKS}
    assert all(f"`{operator}`" in HEAD for operator in OPERATORS)


if __name__ == "__main__":
    FILE.write_text(page())

"""docs/support.md is what the tests show; `python tests/test_support.py` writes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import test_accounting
import test_autograd
import test_compile
import test_export
import test_operators
import test_transforms
from test_transforms import EAGER, OPERATORS, RAISES, TRANSFORMS

FILE = Path(__file__).parent.parent / "docs" / "support.md"
HEAD = """\
# What PyTorch can do with the operators

Each cell is a test that compares numbers with the reference's in float64, or that sees the error raised. `na1d`,
`na2d`, `na3d`, the modules, and the models are faces of `na_forward`, so what holds for it holds for them. This page is
written by `python tests/test_support.py`, and a test compares it with the tests that there are.

## Derivatives and `torch.func`

They are those of every input, the bias and the additional keys among them, through both outputs. What *raises* does so
in PyTorch itself, whatever the operator.
"""
NOTE = """
Reverse mode runs kernels; forward mode and second derivatives run the reference, in memory linear in the number of
tokens. A dash is for what isn't compiled: PyTorch's compiler drops the tangents of dual numbers (compile
`torch.func.jvp` instead) and can't trace `linearize`, whatever the operator; nested forward mode it compiles at
times, and raises at others; `vmap` of `hessian` raises.

## Everything else
"""
# What, the module and the name of its test, and what it shows.
FURTHER = (
    ("vmap over some inputs, a bias for each index among them", test_transforms, "vmap_of_some_inputs"),
    ("vmap over modules, gradients per sample", test_transforms, "an_ensemble_of_modules_with_biases_of_their_own"),
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
    ("`torch.jit.trace`, `torch.jit.script`", test_export, "torchscript_raises"),
)


def page() -> str:
    return "\n".join((HEAD, *transforms(), NOTE, *further(), ""))


def transforms() -> Iterator[str]:
    modes = ("eager", "compiled")
    cells = [(operator, mode) for operator in OPERATORS for mode in modes]
    yield "| | " + " | ".join(f"`{operator}`, {mode}" for operator, mode in cells) + " |"
    yield "| --- " * (len(cells) + 1) + "|"
    for name in TRANSFORMS:
        yield f"| {name} | " + " | ".join(outcome(name, mode) for _, mode in cells) + " |"


def outcome(name: str, mode: str) -> str:
    if (name, mode) in RAISES:
        return "raises"
    return "-" if mode == "compiled" and name in EAGER else "works"


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
    for name in TRANSFORMS:
        for operator in OPERATORS:
            for mode in ("eager", "compiled"):
                assert (outcome(name, mode) == "-") == ((name, operator, mode) not in tested)


if __name__ == "__main__":
    FILE.write_text(page())

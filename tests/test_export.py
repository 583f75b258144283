"""What leaves Python: exported programs, packages of AOTInductor, ONNX; and what does not, TorchScript."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import random_problem
from test_transforms import OPERATORS, point
from torch import Tensor

import natten2
from natten2 import _extension
from natten2.ops import reference
from natten2.ops.schemas import na_backward, na_forward

ROOT = Path(__file__).parent.parent
TOOLS = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
UNSUPPORTED = "natten2 doesn't support torch.jit: use torch.compile or torch.export"


class Attention(torch.nn.Module):
    """Every feature at once, with both outputs."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rpb = torch.nn.Parameter(torch.randn(4, 5, 3, dtype=dtype))

    @property
    def parameters_of_the_window(self) -> tuple:
        return (3, 2), (2, 1), (2, 1), (True, False), 0.3

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *additional: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = additional or (None, None)
        return natten2.na2d(
            query,
            key,
            value,
            *self.parameters_of_the_window,
            rpb=self.rpb,
            additional_keys=keys,
            additional_values=values,
            return_lse=True,
        )

    def reference(self, query: Tensor, key: Tensor, value: Tensor, *additional: Tensor) -> tuple[Tensor, Tensor]:
        extra = additional or (None, None)
        return reference.na_forward(query, key, value, self.rpb, *extra, *self.parameters_of_the_window)


def inputs(
    batch: int, spatial: tuple[int, int] = (7, 6), dtype: torch.dtype = torch.float64, additional: int = 2
) -> tuple[Tensor, ...]:
    problem = random_problem(
        spatial,
        (3, 2),
        batch=batch,
        heads=4,
        key_heads=2,
        head_dim=5,
        value_dim=3,
        additional=additional,
        seed=batch,
        dtype=dtype,
    )
    return tuple(tensor for tensor in problem.tensors if tensor is not None)


BATCH = torch.export.Dim("batch")
SIZES = {0: BATCH, 1: torch.export.Dim("height", min=6), 2: torch.export.Dim("width", min=2)}


def exported(model: torch.nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, inputs(2), dynamic_shapes=(*(SIZES,) * 3, ({0: BATCH},) * 2))


def test_export_with_dynamic_sizes(tmp_path: Path):
    model = Attention(torch.float64)
    with torch.no_grad():
        torch.export.save(exported(model), tmp_path / "attention.pt2")
        loaded = torch.export.load(tmp_path / "attention.pt2").module()
        for batch, spatial in ((1, (6, 9)), (3, (13, 4))):
            others = inputs(batch, spatial)
            torch.testing.assert_close(loaded(*others), model.reference(*others))


@pytest.mark.parametrize(("dtype", "additional"), [(torch.float32, 2), (torch.float16, 0)], ids=str)
def test_onnx(dtype: torch.dtype, additional: int, tmp_path: Path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import natten2.onnx

    model, path = Attention(dtype).eval(), str(tmp_path / "attention.onnx")
    example = inputs(2, dtype=dtype, additional=additional)
    torch.onnx.export(
        model,
        example,
        path,
        dynamo=True,
        dynamic_shapes=(*({0: BATCH},) * 3, *([({0: BATCH},) * additional] if additional else [])),
        custom_translation_table=natten2.onnx.translation_table(),
        verbose=False,
    )
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [entry.domain for entry in graph.opset_import if entry.domain not in ("", "pkg.torch.__subgraph__")] == []
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        others = inputs(batch, dtype=dtype, additional=additional)
        feeds = {node.name: x.numpy() for node, x in zip(session.get_inputs(), others, strict=True)}
        results = tuple(map(torch.from_numpy, session.run(None, feeds)))
        expected = model.reference(*others)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-3
        torch.testing.assert_close(results, expected, rtol=tolerance, atol=tolerance)


def layer() -> torch.nn.Module:
    return natten2.NeighborhoodAttention2D(8, 2, 3)


@pytest.mark.parametrize(
    "convert",
    [
        lambda: torch.jit.trace(lambda x: natten2.na2d(x, x, x, 3), torch.randn(1, 4, 4, 1, 2)),
        lambda: torch.jit.trace(layer(), torch.randn(1, 4, 4, 8)),
        lambda: torch.jit.script(natten2.na2d),
        lambda: torch.jit.script(layer()),
    ],
    ids=["trace", "trace a module", "script", "script a module"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_raises(convert: Callable):
    with pytest.raises((NotImplementedError, RuntimeError), match=UNSUPPORTED):
        convert()


@pytest.mark.parametrize("name", OPERATORS)
def test_torchscript_traces_no_operator(name: str):
    tensors, parameters = point(name)
    with pytest.raises(NotImplementedError, match=UNSUPPORTED):
        torch.jit.trace(lambda *tensors: OPERATORS[name][0](*tensors, *parameters), tuple(tensors))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Attention]:
    """A package of AOTInductor with dynamic batch, height, and width, and the model in it."""
    model, path = Attention(torch.float64), tmp_path_factory.mktemp("package") / "attention.pt2"
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported(model), package_path=str(path))
    return path, model


OTHERS = [(1, (6, 9)), (3, (13, 4))]


@pytest.mark.long
def test_a_package_of_aotinductor(package: tuple[Path, Attention]):
    path, model = package
    loaded = torch._inductor.aoti_load_package(str(path))
    for batch, spatial in OTHERS:
        others = inputs(batch, spatial)
        torch.testing.assert_close(tuple(loaded(*others)), model.reference(*others))


def run(*command: str | Path) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cmake", path=TOOLS) is None, reason="CMake builds the program")
@pytest.mark.timeout(1200)
def test_a_program_without_python_runs_the_package(package: tuple[Path, Attention], tmp_path: Path):
    path, model = package
    cmake = shutil.which("cmake", path=TOOLS)
    run(cmake, "-S", ROOT, "-B", tmp_path, "-DNATTEN2_CPP=ON", f"-DPython_EXECUTABLE={sys.executable}")
    run(cmake, "--build", tmp_path, "--target", "natten2_schemas", "run_package")
    libraries = tmp_path / "natten2_schemas.so", _extension.library_path()
    for batch, spatial in OTHERS:
        others = inputs(batch, spatial)
        torch.save(list(others), tmp_path / "inputs.pt")
        run(tmp_path / "run_package", *libraries, path, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
        results = torch.load(tmp_path / "outputs.pt")
        torch.testing.assert_close(tuple(results), model.reference(*others))


def test_the_schemas_for_programs_without_python_are_those_of_python():
    source = (ROOT / "natten2" / "csrc" / "schemas.cpp").read_text()
    macros = dict(re.findall(r'#define (\w+)\s+(?:\\\n\s*)?("[^"]*")', source))
    (body,) = re.findall(r"STABLE_TORCH_LIBRARY\(natten2, m\) {(.*)}", source, re.DOTALL)
    for name, text in macros.items():
        body = body.replace(name, text)
    schemas = ["".join(re.findall(r'"([^"]*)"', call)) for call in body.split("m.def(")[1:]]
    in_python = [op._schema for op in (na_forward, na_backward)]
    assert [torch._C.parse_schema(f"natten2::{schema}") for schema in schemas] == in_python

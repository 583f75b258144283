import importlib.util
import os
from dataclasses import replace

# Cached graphs don't know that an operator's formulas changed: see every compilation afresh.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton decides when it is imported whether its kernels are interpreted, which they are where there is no GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from natten2 import _extension


def _hasten_interpreter() -> None:
    """Leaves out what makes Triton's interpreter several times slower, and changes no result.

    It puts its functions into `triton.language` at every call of a device function, where once for each module is
    enough, and prepares a check of overflows that only its debug mode makes.
    """
    from triton.runtime import interpreter

    builder, patched = interpreter.interpreter_builder, set()
    builder.options = replace(builder.options, sanitize_overflow=False)

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _hasten_interpreter()

settings.register_profile(
    "natten2",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("natten2")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> None:
    """Forgets every compiled graph, and with them how often a function was compiled."""
    torch.compiler.reset()


@pytest.fixture(params=_extension.cpu_capabilities())
def capability(request: pytest.FixtureRequest) -> str:
    """Runs a test with the kernels of every instruction set that this machine has."""
    before = _extension.cpu_capability()
    _extension.set_cpu_capability(request.param)
    yield request.param
    _extension.set_cpu_capability(before)

import os

# Cached graphs don't know that an operator's formulas changed: see every compilation afresh.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton decides when it is imported whether its kernels are interpreted, which they are where there is no GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from natten2 import _extension

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

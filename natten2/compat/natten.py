"""`import natten2.compat.natten as natten`: the names of every generation, without changing what others import."""

from natten2.compat._names import UNION, modules

_modules = modules(UNION)
globals().update({name: value for name, value in vars(_modules["natten"]).items() if not name.startswith("__")})
__version__ = _modules["natten"].__version__
__all__ = _modules["natten"].__all__

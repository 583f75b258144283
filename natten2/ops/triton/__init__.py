"""The GPU kernels, in Triton. Only :mod:`natten2.ops.cuda` imports this package, when it first runs a kernel."""

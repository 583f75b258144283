"""Registers the rules of tensor subclasses whose modules take long to import, when, and only if, those are imported."""

from __future__ import annotations

import importlib

from natten2._when_imported import when_imported

# No dispatch key of ours comes before a subclass's own dispatch, so that there is nothing else to notice it by.
when_imported("torch.distributed.tensor", lambda: importlib.import_module("natten2.ops.sharding"))

"""Models built on neighborhood attention."""

from natten2._when_imported import when_imported
from natten2.models import _timm, zoo
from natten2.models.checkpoints import LoadReport, load_checkpoint
from natten2.models.config import NATConfig
from natten2.models.nat import NAT, NATFeatures
from natten2.models.zoo import *  # noqa: F403

__all__ = ["NAT", "LoadReport", "NATConfig", "NATFeatures", "load_checkpoint", *zoo.__all__]

when_imported("timm.models", _timm.register)

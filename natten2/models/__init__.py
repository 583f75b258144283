"""Models built on neighborhood attention."""

from natten2.models.nat import NAT, NATConfig, nat_base, nat_mini, nat_small, nat_tiny

__all__ = ["NAT", "NATConfig", "nat_base", "nat_mini", "nat_small", "nat_tiny"]

"""M3 (multi-scale-momentum Muon) and AdamW in one optimizer, with the table that routes parameters to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .m3 import M3 as M3

__all__ = ["M3"]


def __getattr__(name: str) -> Any:
    """Import torch only for whoever wants the optimizer: a configuration's schema is in this package too."""
    if name == "M3":
        from .m3 import M3

        return M3
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

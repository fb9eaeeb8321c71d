"""lmnas finds neural architectures for language, trains the one it found, and hands it over."""

from typing import Any

from lmnas.core.version import VERSION as __version__

__all__ = ["__version__", "load", "search"]


def __getattr__(name: str) -> Any:
    # imported when asked for: `lmnas list` should not wait for torch
    if name in ("load", "search"):
        from lmnas.runs import api

        return getattr(api, name)
    raise AttributeError(f"module 'lmnas' has no attribute {name!r}")

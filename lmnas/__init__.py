"""lmnas finds neural architectures for language, trains the one it found, and hands it over."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "search"]


def __getattr__(name: str) -> Any:
    # imported when asked for: `lmnas list` should not wait for torch
    if name in __all__:
        from lmnas import api

        return getattr(api, name)
    raise AttributeError(f"module 'lmnas' has no attribute {name!r}")

"""Folders outside a run: data sets and caches.

LMNAS_CACHE names the folder of all caches, LMNAS_DATA that of the data sets; without them the system's cache folder for
this user holds both.
"""

import os
from pathlib import Path

import platformdirs

from lmnas.core.errors import UserError


def cache(kind: str) -> Path:
    """Folder of one kind of cache (`corpora`, `images`)."""
    return _named("LMNAS_CACHE", platformdirs.user_cache_path("lmnas")) / kind


def data() -> Path:
    """Folder in which named data sets are looked for, each in a folder of its own, and downloaded to."""
    return _named("LMNAS_DATA", platformdirs.user_cache_path("lmnas") / "data")


def _named(variable: str, default: Path) -> Path:
    value = os.environ.get(variable)
    try:
        return Path(value).expanduser() if value else default.expanduser()
    except RuntimeError:
        raise UserError(f"{variable} is {value!r}; expected a folder, but this user has no home directory") from None

"""Contract of the modules that `lmnas bench` can run."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Say = Callable[[str], None]
"""Takes one line of progress."""


class Bench(Protocol):
    """A module with these names."""

    HELP: str
    """One line."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """The options of its own; `--json` and `--out` are the command line's."""
        ...

    def run(self, options: argparse.Namespace, say: Say) -> dict[str, Any]:
        """Measure; the result is one JSON document.

        Raises:
            UserError: options that cannot be, or a measurement that must not be reported.
        """
        ...

    def text(self, document: dict[str, Any]) -> str:
        """A table for the terminal."""
        ...

    def pictures(self, document: dict[str, Any], folder: Path) -> list[Path]:
        """Draw PNG files into an existing folder; their paths."""
        ...

"""Pieces of a report: what the renderers of details and statistics give, and the page shows in their order.

A renderer ("panel") is registered in `lmnas.core.registry` under the name of the detail or statistic that it shows; it
is a function (value, context) -> Panel.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lmnas.core import registry
from lmnas.core.errors import UserError


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        numbers: the columns set flush right; None: all but the first.
        title: a heading above it, or the summary under which it is folded.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] | None = None
    title: str = ""
    folded: bool = False
    block: ClassVar[str] = "rows"

    @property
    def flush(self) -> Collection[int]:
        return range(1, max(map(len, [self.columns, *self.rows]))) if self.numbers is None else self.numbers


@dataclass(frozen=True)
class Figure:
    """SVG text with a caption; a `wide` one takes the page's width instead of a place in a row."""

    svg: str
    caption: str = ""
    wide: bool = False
    block: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Data:
    """Text that is shown unchanged, folded under its title."""

    title: str
    text: str
    block: ClassVar[str] = "data"


Block = Table | Figure | Data
EMPTY: tuple[Any, ...] = (None, [], {}, "")
"""Values of which there is nothing to show."""


@dataclass(frozen=True)
class Context:
    """Surroundings of a detail or statistic in a record.

    Attributes:
        beside: the record that holds it, by name.
        seed: of the training (or search) that left it.
        items: what predictions are made for, such as `images`.
    """

    beside: Mapping[str, Any]
    seed: int | None
    items: str


@dataclass(frozen=True)
class Panel:
    """Blocks of one entry, and the names of the other entries of the record that they show too."""

    blocks: Sequence[Block]
    used: Collection[str] = ()


def rendered(entries: Mapping[str, Any], context: Context) -> list[Block]:
    """The blocks of all `entries`, each by the panel of its name; those without one are folded as data, at the end."""
    blocks: list[Block] = []
    unknown = dict(entries)
    for name, value in entries.items():
        if panel := _panel(name, value, context):
            blocks += panel.blocks
            for used in (name, *panel.used):
                unknown.pop(used, None)
    return blocks + [Data(name, json.dumps(value, indent=2)) for name, value in unknown.items() if value not in EMPTY]


def known(entries: Mapping[str, Any], context: Context) -> list[Block]:
    """The blocks of those `entries` that have a panel."""
    panels = [_panel(name, value, context) for name, value in entries.items()]
    return [block for panel in panels if panel for block in panel.blocks]


def _panel(name: str, value: Any, context: Context) -> Panel | None:
    if value in EMPTY:
        return None
    try:
        return registry.component("panel", name)(value, context)
    except UserError:  # no panel of this name, or one of another package that is not installed here
        return None

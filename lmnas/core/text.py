"""Text for the terminal: tables and durations."""

import io
import shutil
import sys
from collections.abc import Sequence

UNLIMITED = 1_000_000
"""Number of characters of a line without a terminal."""


def seconds_text(seconds: float) -> str:
    """`4.25` -> `4.2 s`, `75` -> `1 min 15 s`, `3725` -> `1 h 2 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Aligned columns, two spaces apart: the first flush left, the others flush right.

    Args:
        width: characters of a line, within which cells are wrapped between words where they can be. None: those of the
            terminal that standard output is, unlimited where it is none (a file, a pipe), so that a row is one line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED
    cells = [*zip(header, *rows, strict=True)]
    shortest = [max((len(word) for cell in column for word in cell.split()), default=0) for column in cells]
    widths = [max(map(len, column)) for column in cells]
    while sum(widths) + 2 * len(widths) > width and widths != shortest:
        slack = [wide - least for wide, least in zip(widths, shortest, strict=True)]
        widths[slack.index(max(slack))] -= 1
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for i, wide in enumerate(widths):
        grid.add_column(justify="right" if i else "left", width=wide)
    for row in (header, *rows):
        grid.add_row(*map(Text, row))  # as it stands: a name in brackets is no markup
    file = io.StringIO()
    Console(file=file, width=UNLIMITED, color_system=None, force_terminal=False).print(grid)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

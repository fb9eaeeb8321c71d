"""Published tables of trained architectures, read as values: no training is repeated, and none is made up."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmnas.core import places
from lmnas.core.errors import UserError

NAS_BENCH_NLP = "nas-bench-nlp"
FILE = "architectures.jsonl"


@dataclass(frozen=True)
class PublishedCell:
    """A recurrent cell of NAS-Bench-NLP (Klyuchnikov et al., 2020, arXiv 2006.07116) and the results of its trainings.

    Attributes:
        group: equal for cells that are one function up to names and order.
        recipe: node -> {op, input}.
        loss: mean final test loss on Penn Treebank, nats per token, over the trainings that have one; None: none has.
        scored: the losses that the published table of metrics has, one a training.
        n_runs: trainings on Penn Treebank.
    """

    id: int
    group: str
    recipe: dict[str, Any]
    loss: float | None
    scored: tuple[float, ...]
    n_runs: int


def nas_bench_nlp(data: str, where: str = "data") -> list[PublishedCell]:
    """All cells of a table in the format of the benchmark's export, in its order.

    Args:
        data: the file, a folder with it, or `nas-bench-nlp` for the one in `places.data()`.
        where: name of the setting, for messages.

    Raises:
        UserError: no such file, or a line that is no entry.
    """
    path = Path(data)
    if data == NAS_BENCH_NLP and not path.exists():
        path = places.data() / NAS_BENCH_NLP
    path = path / FILE if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} {path}: cannot be read ({error})") from None
    cells = []
    for number, line in enumerate(lines, start=1):
        try:
            cells.append(_cell(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"{where} {path}, line {number}: expected an entry with id, group, recipe and ptb.runs"
            ) from None
    return cells


def _cell(entry: dict[str, Any]) -> PublishedCell:
    runs = entry["ptb"]["runs"]
    losses = [run["test_loss"] for run in runs if run["test_loss"] is not None]
    # runs that the published table leaves out count only where the file does not say
    scored = [run["test_loss"] for run in runs if run.get("scored", True) and run["test_loss"] is not None]
    mean = entry["ptb"].get("test_loss_mean")
    if mean is None and losses:
        mean = sum(losses) / len(losses)
    if not isinstance(entry["recipe"], dict):
        raise TypeError
    return PublishedCell(
        entry["id"], str(entry["group"]), entry["recipe"], mean if losses else None, tuple(scored), len(runs)
    )

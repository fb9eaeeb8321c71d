"""`lmnas bench memory`: the peak of resident memory of training steps, ours and plain, beside what was forecast.

Each is measured in a process of its own, as growth since before the model was built.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from lmnas.cli.bench import peak
from lmnas.cli.bench.contract import Say
from lmnas.cli.bench.machine import processor
from lmnas.cli.bench.options import add_common, chosen_rows, settle_kernel, settle_threads
from lmnas.cli.bench.rows import ROWS, Row, Sizes
from lmnas.core.contracts import Model
from lmnas.core.genotype import Genotype
from lmnas.core.text import columns
from lmnas.nn.cost import step_forecast
from lmnas.report.plots import FAINT, MODEL_COLOURS, STYLE

HELP = "peak memory of training steps, measured and forecast"
STEPS = ("search-weight", "search-first-order", "search-second-order", "retrain", "enas-shared")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    names = chosen_rows(options.rows, STEPS)
    threads = settle_threads(options.threads)
    kernel = settle_kernel(options.kernel, say)
    sizes = Sizes.small() if options.small else Sizes()
    rows = []
    for name in names:
        say(f"{name} ...")
        ours, plain = (
            peak.measure(name, side, threads, kernel, options.per_edge, options.small) for side in peak.SIDES
        )
        forecast = forecast_bytes(ROWS[name](sizes, torch.device("cpu"), options.per_edge), kernel)
        rows.append(
            {
                "row": name,
                "peak_memory_bytes": ours,
                "plain_peak_memory_bytes": plain,
                "share_of_plain": ours / plain,
                "forecast_bytes": forecast,
                "forecast_ratio": forecast / ours,
            }
        )
    return {
        "rows": rows,
        "kernel": kernel,
        "threads": threads,
        "processor": processor(),
        "torch": torch.__version__,
        "small": options.small,
    }


def forecast_bytes(row: Row, kernel: str) -> int:
    """Forecast of `lmnas.nn.cost` for our side of a row."""
    assert isinstance(row.model, Model) and row.batch is not None
    choice = row.choice
    if choice is not None and not isinstance(choice, Genotype):
        choice = {name: p.detach().to("meta").requires_grad_(p.requires_grad) for name, p in choice.items()}
    model = copy.deepcopy(row.model).to("meta")
    return step_forecast(model, row.batch, choice, kernel, copies=row.copies).total


def text(document: dict[str, Any]) -> str:
    header = ("row", "ours MiB", "plain MiB", "ours/plain", "forecast MiB", "forecast/ours")
    rows = [
        (
            row["row"],
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            f"{row['plain_peak_memory_bytes'] / 2**20:,.0f}",
            f"{row['share_of_plain']:.2f}",
            f"{row['forecast_bytes'] / 2**20:,.0f}",
            f"{row['forecast_ratio']:.2f}",
        )
        for row in document["rows"]
    ]
    place = f"kernel {document['kernel']}, {document['threads']} threads, {document['processor']}"
    return f"{columns(header, rows)}\n\n{place}, torch {document['torch']}"


def pictures(document: dict[str, Any], folder: Path) -> list[Path]:
    """`memory.png`: ours, forecast and plain of every row."""
    rows = document["rows"]
    bars = (
        ("ours", "peak_memory_bytes", MODEL_COLOURS["searched"]),
        ("forecast", "forecast_bytes", MODEL_COLOURS["random"]),
        ("plain", "plain_peak_memory_bytes", FAINT),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 1.2 + 0.6 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for number, (label, key, colour) in enumerate(bars):
            places = [i + 0.25 * (number - 1) for i in range(len(rows))]
            axes.barh(places, [row[key] / 2**20 for row in rows], height=0.22, color=colour, label=label)
        axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("peak memory of one step, MiB")
        axes.legend(loc="upper right")
        path = folder / "memory.png"
        figure.savefig(path, dpi=150)
    return [path]

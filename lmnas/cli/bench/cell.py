"""`lmnas bench cell`: the recurrent cell and the loss against the formulation of the papers' published codes.

Rounds are interleaved, ours then plain, and every round gives one ratio; a round in which others used the processor is
dropped and taken again. Both sides must agree on every loss, or nothing is reported.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from lmnas.cli.bench import peak
from lmnas.cli.bench.contract import Say
from lmnas.cli.bench.machine import Watch, clock, processor, product_rates
from lmnas.cli.bench.options import (
    add_common,
    chosen_rows,
    positive,
    settle_device,
    settle_kernel,
    settle_threads,
)
from lmnas.cli.bench.rows import ROWS, Row, Sizes, search_step_flops
from lmnas.core.errors import UserError
from lmnas.core.text import columns
from lmnas.report.plots import FAINT, MODEL_COLOURS, STYLE

HELP = "speed and memory of the recurrent cell and the loss, ours against the published codes' formulation"
MAX_FOREIGN = 0.15
"""Cores; a round in which others used more is dropped."""
ATTEMPTS = 3
"""Times the rounds asked for are attempted at most."""
LOSSES_AGREE = 1e-4
"""Relative. Sums differ in order alone."""
NORMS_AGREE = 1e-2
"""Relative. A gradient through batch norm over time magnifies rounding."""
SIDE_SECONDS = 0.5
"""A side is repeated within a round to last about so long: the system counts CPU time in hundredths of a second."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--rounds", type=int, default=5, help="clean rounds of each row (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, which takes a process a side")


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    names = chosen_rows(options.rows, ROWS)
    rounds = positive("--rounds", options.rounds)
    device = settle_device(options.device)
    threads = settle_threads(options.threads)
    kernel = settle_kernel(options.kernel, say) if device.type == "cpu" else "reference"
    sizes = Sizes.small() if options.small else Sizes()
    rates = product_rates(threads, device, 0.02 if options.small else 0.3)
    best_rate = max(rate for route in rates.values() for rate in route.values() if rate is not None)
    seconds = 0.01 if options.small else SIDE_SECONDS
    rows = []
    for name in names:
        say(f"{name} ...")
        found = measure(name, ROWS[name](sizes, device, options.per_edge), rounds, threads, device, seconds)
        if not options.no_memory:
            for side, key in (("ours", "peak_memory_bytes"), ("plain", "plain_peak_memory_bytes")):
                if device.type == "cpu":
                    found[key] = peak.measure(name, side, threads, kernel, options.per_edge, options.small)
                else:
                    found[key] = _peak_on_gpu(name, side, sizes, device, options.per_edge)
        rows.append(found)
    search = next((row for row in rows if row["row"] == "search-weight"), None)
    fraction = None
    if search is not None:
        steps_per_second = search["ours_per_second"] / (sizes.bptt * sizes.search_batch)
        fraction = steps_per_second * search_step_flops(sizes) / 1e9 / best_rate
    return {
        "rows": rows,
        "gemm_gflops": best_rate,
        "gemm_routes": rates,
        "gemm_fraction": fraction,
        "kernel": kernel,
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor(),
        "torch": torch.__version__,
        "per_edge": options.per_edge,
        "small": options.small,
    }


def measure(
    name: str, row: Row, rounds: int, threads: int, device: torch.device, seconds: float = SIDE_SECONDS
) -> dict[str, Any]:
    """Interleaved rounds of both sides.

    Returns:
        Tokens per second and the ratio's median and extremes over the clean rounds; the disturbed ones with
        `disturbed: true` where clean ones were too few.

    Raises:
        UserError: the sides' losses differ.
    """
    now = clock(threads, device)

    def timed(work: Callable[[], tuple[float, ...]], times: int) -> tuple[float, list[tuple[float, ...]]]:
        began = now()
        values = [work() for _ in range(times)]
        return (now() - began) / times, values

    def agree(ours: list[tuple[float, ...]], plain: list[tuple[float, ...]]) -> None:
        for one, other in zip(ours, plain, strict=False):
            check(name, one, other, row.same)

    # warm up: once for what is built at first use, once to see how long it takes
    agree([row.ours()], [row.plain()])
    (ours_once, ours_values), (plain_once, plain_values) = timed(row.ours, 1), timed(row.plain, 1)
    agree(ours_values, plain_values)
    ours_times, plain_times = (math.ceil(seconds / max(once, 1e-6)) for once in (ours_once, plain_once))
    clean: list[tuple[float, float]] = []
    disturbed: list[tuple[float, float]] = []
    while len(clean) < rounds and len(clean) + len(disturbed) < ATTEMPTS * rounds:
        watch = Watch()
        ours, ours_values = timed(row.ours, ours_times)
        plain, plain_values = timed(row.plain, plain_times)
        agree(ours_values, plain_values)
        (clean if watch.foreign_cores() <= MAX_FOREIGN else disturbed).append((ours, plain))
    few = len(clean) < rounds
    used = clean + disturbed if few else clean
    ratios = [plain / ours for ours, plain in used]
    return {
        "row": name,
        "ours_per_second": row.tokens / statistics.median(ours for ours, _ in used),
        "plain_per_second": row.tokens / statistics.median(plain for _, plain in used),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rounds": len(used),
        "rounds_dropped": len(disturbed),
        "disturbed": few,
        "peak_memory_bytes": None,
        "plain_peak_memory_bytes": None,
    }


def check(name: str, ours: tuple[float, ...], plain: tuple[float, ...], same: bool) -> None:
    """Refuse to report a kernel that computes something else.

    Args:
        ours, plain: a loss, and the norm of its gradient where there is one, by turns.
        same: False: they need only be finite.

    Raises:
        UserError
    """
    if not all(math.isfinite(value) for value in (*ours, *plain)):
        raise UserError(f"row {name}: a loss or gradient is not finite; its speed means nothing")
    kinds = itertools.cycle((("loss", LOSSES_AGREE), ("gradient norm", NORMS_AGREE)))
    for (what, limit), one, other in zip(kinds, ours, plain, strict=False):
        if same and abs(one - other) > limit * abs(other):
            raise UserError(
                f"row {name}: the {what} is {one:.7g} with our kernel and {other:.7g} with the plain formulation; "
                f"they may differ by {limit:g} of it, so nothing is reported"
            )


def _peak_on_gpu(name: str, side: str, sizes: Sizes, device: torch.device, per_edge: bool) -> int:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    row = ROWS[name](sizes, device, per_edge)
    for _ in range(peak.TIMES):
        (row.ours if side == "ours" else row.plain)()
    return torch.cuda.max_memory_allocated(device) - before


def text(document: dict[str, Any]) -> str:
    header = ("row", "ours tokens/s", "plain tokens/s", "ratio", "least", "most", "rounds", "peak MiB", "plain MiB")
    rows = []
    for row in document["rows"]:
        rates = (row["ours_per_second"], row["plain_per_second"])
        ratios = (row["ratio_median"], row["ratio_min"], row["ratio_max"])
        peaks = (row["peak_memory_bytes"], row["plain_peak_memory_bytes"])
        rounds = f"{row['rounds']}{'*' if row['disturbed'] else ''}"
        rows.append(
            (
                row["row"],
                *(f"{rate:,.0f}" for rate in rates),
                *(f"{ratio:.2f}" for ratio in ratios),
                rounds,
                *("-" if value is None else f"{value / 2**20:,.0f}" for value in peaks),
            )
        )
    fraction = document["gemm_fraction"]
    reached = "" if fraction is None else f"; the search step reaches {fraction:.0%} of that"
    lines = [
        columns(header, rows),
        "",
        f"products: {document['gemm_gflops']:,.0f} GFLOP/s{reached}",
        f"kernel {document['kernel']}, {document['threads']} threads, {document['processor']}",
        f"torch {document['torch']}",
    ]
    if any(row["disturbed"] for row in document["rows"]):
        lines.append(f"* the machine was busy: others used more than {MAX_FOREIGN} cores in most rounds")
    return "\n".join(lines)


def pictures(document: dict[str, Any], folder: Path) -> list[Path]:
    """`cell.png`: bars of the ratios, whiskers from the least to the most."""
    rows = document["rows"]
    medians = [row["ratio_median"] for row in rows]
    whiskers = [
        [row["ratio_median"] - row["ratio_min"] for row in rows],
        [row["ratio_max"] - row["ratio_median"] for row in rows],
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 0.8 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, medians, xerr=whiskers, color=MODEL_COLOURS["searched"], ecolor=FAINT, height=0.62, capsize=2)
        axes.axvline(1.0, color=FAINT, linewidth=1.0)
        axes.set_yticks(places, [row["row"] for row in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("tokens per second, ours over plain")
        axes.set_title(f"kernel {document['kernel']}, {document['threads']} threads, {document['processor']}")
        path = folder / "cell.png"
        figure.savefig(path, dpi=150)
    return [path]

"""`lmnas bench curvature`: the methods of `lmnas.nn.curvature` against exact second derivatives, and what they cost.

Small supernets of the recurrent cell are trained on the embedded text, weights and switches together; then every method
estimates the curvature of the same batches in float64. Times are of one segment at the size of a small search, beside
forward and backward passes of the same supernet, interleaved.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy import stats
from torch import Tensor

from lmnas.cli.bench.contract import Say
from lmnas.cli.bench.machine import clock, processor
from lmnas.cli.bench.options import chosen_rows, positive, settle_kernel, settle_threads
from lmnas.core.contracts import Batch, Mixture
from lmnas.core.seeds import generator
from lmnas.core.text import columns
from lmnas.nn.curvature import METHODS, diagonal, exact_diagonal
from lmnas.nn.kernels import Operands, recurrent_mixture, use
from lmnas.report.plots import FAINT, STYLE
from lmnas.spaces.recurrent.cell import RecurrentCell
from lmnas.tasks.language_modeling import BatchSettings, LanguageModel, LanguageModeling, ModelSettings, segment

HELP = "second derivatives by the switches of a supernet: each method against the exact ones, and its cost"
ORACLE = "exact"
UNTIED = "untied"
"""The exact ones of switches that are free at every step, summed: what leaving out the tie costs alone."""
N_BATCHES = 2
SLOW = 20.0
"""Times a forward and backward pass; a method that takes longer is timed once."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks whose curvature is compared and of those that are timed."""

    n_nodes: int = 3
    width: int = 16
    batch: int = 8
    bptt: int = 12
    vocabulary: int = 200
    steps: int = 400
    timed_nodes: int = 8
    timed_width: int = 64
    timed_batch: int = 32
    timed_bptt: int = 35
    timed_vocabulary: int = 10_000

    @classmethod
    def small(cls) -> "Sizes":
        """Seconds for all: to try, not to report."""
        return cls(2, 6, 4, 5, 40, 20, 2, 8, 4, 5, 40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", help="only these, separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="networks that are trained (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each method, of which the least counts")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores up to four)")
    parser.add_argument("--kernel", default="auto", help="of the pass compared with: auto, fused or reference")
    # toy sizes, for tests of the bench itself
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    methods = [name for name in chosen_methods(options.methods) if name != ORACLE]
    n_seeds, rounds = positive("--seeds", options.seeds), positive("--rounds", options.rounds)
    threads = settle_threads(options.threads)
    kernel = settle_kernel(options.kernel, say)
    sizes = Sizes.small() if options.small else Sizes()
    points: dict[str, dict[str, list[list[list[float]]]]] = {}
    task = LanguageModeling(data="pydoc", max_vocabulary=sizes.vocabulary)
    use(kernel="reference")  # the trained networks, so the accuracies, are the same with every kernel
    for seed in range(n_seeds):
        say(f"network {seed + 1} of {n_seeds} ...")
        for state, steps in (("untrained", 0), ("trained", sizes.steps)):
            model, batches, mixture = network(task, sizes, steps, seed)
            exact = _offered(diagonal(ORACLE, model, batches, mixture, seed))
            for name in (*methods, UNTIED):
                if name == UNTIED:
                    found = untied(model, batches, mixture)[:, 1:].flatten()
                else:
                    found = _offered(diagonal(name, model, batches, mixture, seed))
                points.setdefault(name, {}).setdefault(state, []).append([exact.tolist(), found.tolist()])
    say("times ...")
    times = timings([ORACLE, *methods], sizes, rounds, threads, kernel)
    rows = [
        {
            "method": name,
            "description": METHODS[name].description if name in METHODS else "exact for switches free at every step",
            "draws": METHODS[name].draws if name in METHODS else 0,
            **{state: agreement(pairs) for state, pairs in points.get(name, {}).items()},
            **times.get(name, {}),
        }
        for name in [ORACLE, *methods, UNTIED]
    ]
    return {
        "rows": rows,
        "points": {name: found["trained"] for name, found in points.items()},
        "pass_milliseconds": times["pass"],
        "seeds": n_seeds,
        "rounds": rounds,
        "sizes": asdict(sizes),
        "kernel": kernel,
        "threads": threads,
        "processor": processor(),
        "torch": torch.__version__,
        "small": options.small,
    }


def chosen_methods(given: str | None) -> list[str]:
    """The names in `given`, else all.

    Raises:
        UserError: unknown or none.
    """
    return chosen_rows(given, METHODS, "--methods", "method")


def _offered(table: Mapping[str, Tensor]) -> Tensor:
    """Without the column of `none`, which no derivative reaches."""
    return table["nodes"][:, 1:].flatten()


def relax(switches: Tensor, space: RecurrentCell) -> Mixture:
    """Switches (E, K) of one are the mean of a node's incoming operations."""
    table = space.tables()[0]
    shares = torch.tensor([1.0 / (node * len(space.activations)) for node, _ in table.edges], dtype=switches.dtype)
    return {"nodes": torch.cat([torch.zeros_like(switches[:, :1]), switches * shares[:, None]], dim=1)}


def network(task: LanguageModeling, sizes: Sizes, steps: int, seed: int) -> tuple[LanguageModel, list[Batch], Mixture]:
    """A supernet in float64 trained for `steps` steps, the batches that followed with their carried states, its
    mixture."""
    space = RecurrentCell(n_nodes=sizes.n_nodes, batch_norm="none")
    model = task.model(space.supernet(sizes.width), ModelSettings(width=sizes.width, init_range=0.1))
    model.initialise(generator(seed, "bench", "weights"))
    model.double()
    switches = torch.ones(len(space.tables()[0].edges), len(space.activations), dtype=torch.float64)
    switches.requires_grad_()
    optimizer = torch.optim.Adam([*model.parameters(), switches], lr=0.01)
    stream = task.stream("train", BatchSettings(batch_size=sizes.batch, bptt=sizes.bptt), seed)
    batches: list[Batch] = []
    for step in range(steps + N_BATCHES + 1):
        batch = stream.next()
        loss, state = model(batch, {}, relax(switches, space), False)
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        elif step > steps:  # one in between, so that an untrained network has a carried state too
            batches.append(batch)
        stream.keep(state if stream.position else None)
    return model, batches, relax(switches.detach(), space)


def untied(model: LanguageModel, batches: list[Batch], mixture: Mixture) -> Tensor:
    """(E, K): the trace over steps of the Hessian by a mixture for every step. A path of its own through the cell."""
    total = torch.zeros_like(mixture["nodes"])
    body: Any = model.body
    weights = body.w_input.detach(), [weight.detach() for weight in body.w_nodes]
    head = model.embedding.detach(), None if model.bias is None else model.bias.detach()
    for batch in batches:
        inputs = model.embedded(batch, {}).detach()
        start = model.state_before(batch)

        def loss(tables: Tensor, inputs: Tensor = inputs, h: Tensor = start, targets: Tensor = batch.targets) -> Tensor:
            hs = []
            for x, table in zip(inputs, tables, strict=True):
                h = recurrent_mixture(Operands(x[None], h, *weights), *body.encode({"nodes": table}))[0]
                hs.append(h)
            return F.cross_entropy(F.linear(torch.cat(hs), *head), targets.flatten())

        total += exact_diagonal(loss, mixture["nodes"].repeat(len(inputs), 1, 1)).sum(0) / len(batches)
    return total


def agreement(pairs: list[list[list[float]]]) -> dict[str, Any]:
    """Over networks: rank correlation of each, quartiles of estimate / exact, share of exact values below zero."""
    correlations = [float(stats.spearmanr(exact, found).statistic) for exact, found in pairs]
    exact, found = (torch.tensor([p[i] for p in pairs], dtype=torch.float64).flatten() for i in range(2))
    ratios = (found / exact)[exact != 0]
    quartiles = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {
        "rank_correlations": correlations,
        "rank_correlation_median": statistics.median(correlations),
        "ratio_quartiles": quartiles,
        "exact_below_zero": float((exact < 0).double().mean()),
    }


def timings(methods: list[str], sizes: Sizes, rounds: int, threads: int, kernel: str) -> dict[str, Any]:
    """Seconds of every method as passes: forward and backward of the same supernet in float32, by weights and mixture,
    with the plain kernel and with `kernel`. Rounds are interleaved; the least of each counts."""
    space = RecurrentCell(n_nodes=sizes.timed_nodes, batch_norm="none")
    settings = ModelSettings(width=sizes.timed_width)
    model = LanguageModel(space.supernet(sizes.timed_width), sizes.timed_vocabulary, settings)
    noise = generator(0, "bench", "curvature")
    model.initialise(noise)
    shape = (sizes.timed_bptt + 1, sizes.timed_batch)
    tokens = torch.randint(sizes.timed_vocabulary, shape, generator=noise)
    batch = segment(tokens)
    ones = torch.ones(len(space.tables()[0].edges), len(space.activations))
    now = clock(threads, torch.device("cpu"))

    def one_pass() -> None:
        switches = ones.clone().requires_grad_()
        model(batch, {}, relax(switches, space), False)[0].backward()
        model.zero_grad(set_to_none=True)

    def timed(work: Callable[[], Any], which: str) -> float:
        use(kernel=which)
        began = now()
        work()
        return now() - began

    kernels = ["reference"] if kernel == "reference" else ["reference", kernel]
    for which in kernels:
        timed(one_pass, which)  # what is built at first use
    passes: dict[str, list[float]] = {which: [] for which in kernels}
    taken: dict[str, list[float]] = {name: [] for name in methods}
    mixture = relax(ones, space)
    for number in range(rounds):
        for which in kernels:
            passes[which].append(timed(one_pass, which))
        for name in methods:
            if number == 0 or taken[name][0] < SLOW * passes["reference"][0]:
                work = partial(diagonal, name, model, [batch], mixture, 0)
                taken[name].append(timed(work, kernel))
    use(kernel=kernel)
    least = {which: min(found) for which, found in passes.items()}
    result: dict[str, Any] = {"pass": {which: 1000 * seconds for which, seconds in least.items()}}
    for name in methods:
        result[name] = {
            "milliseconds": 1000 * min(taken[name]),
            "passes": {which: min(taken[name]) / seconds for which, seconds in least.items()},
            "timings": len(taken[name]),
        }
    return result


def text(document: dict[str, Any]) -> str:
    kernels = list(document["pass_milliseconds"])
    header = ["method", "untrained", "trained", "least", "est./exact", "quartiles"]
    header += [f"passes ({which})" for which in kernels]
    rows = []
    for row in document["rows"]:
        cells = [row["method"]]
        if row["method"] == ORACLE:
            cells += ["1"] * 4 + [""]
        else:
            low, middle, high = row["trained"]["ratio_quartiles"]
            cells += [f"{row[state]['rank_correlation_median']:.3f}" for state in ("untrained", "trained")]
            cells += [f"{min(row['trained']['rank_correlations']):.3f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        rows.append([*cells, *(f"{row['passes'][which]:.2f}" if "passes" in row else "" for which in kernels)])
    s = document["sizes"]
    lines = [
        columns(header, rows),
        "",
        f"{UNTIED}: the exact ones if every step had switches of its own, summed over steps.",
        f"Rank correlation with exact second derivatives, median of {document['seeds']} networks before and after "
        f"{s['steps']} steps, and the least of the trained; estimate / exact over all entries of the trained ones.",
        f"Networks: {s['n_nodes']} nodes, width {s['width']}, {N_BATCHES} batches of {s['batch']} x {s['bptt']}, "
        f"vocabulary at most {s['vocabulary']}, float64.",
        f"Passes forward and backward of a supernet of {s['timed_nodes']} nodes, width {s['timed_width']}, one batch "
        f"of {s['timed_batch']} x {s['timed_bptt']}, vocabulary {s['timed_vocabulary']}: "
        + ", ".join(f"{value:.0f} ms ({which})" for which, value in document["pass_milliseconds"].items())
        + f"; {document['threads']} threads, {document['processor']}, torch {document['torch']}",
    ]
    return "\n".join(lines)


def pictures(document: dict[str, Any], folder: Path) -> list[Path]:
    """`curvature.png`: sizes of every method's estimates against the exact ones, trained networks, one colour each; a
    cross is an estimate of the wrong sign."""
    points = document["points"]
    if not points:
        return []
    sizes = torch.tensor([pair for pairs in points.values() for pair in pairs], dtype=torch.float64).abs()
    sizes = sizes[sizes > 0]
    low, high = (sizes.quantile(q).item() for q in (0.01, 1.0))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.4 * len(points), 3.1), layout="constrained")
        panels = figure.subplots(1, len(points), squeeze=False, sharex=True, sharey=True)[0]
        for axes, row in zip(panels, (r for r in document["rows"] if r["method"] in points), strict=True):
            axes.plot([low, high], [low, high], color=FAINT, linewidth=0.8, zorder=0)
            for number, pair in enumerate(points[row["method"]]):
                exact, found = torch.tensor(pair, dtype=torch.float64)
                wrong = exact * found < 0
                for kept, marker in ((~wrong, "."), (wrong, "x")):
                    x, y = exact[kept].abs().tolist(), found[kept].abs().tolist()
                    axes.plot(x, y, marker, color=f"C{number % 10}", markersize=4, alpha=0.8)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xlim(low / 1.5, high * 1.5)
            axes.set_ylim(low / 1.5, high * 1.5)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("exact")
            axes.set_title(f"{row['method']}, ρ {row['trained']['rank_correlation_median']:.2f}", fontsize="medium")
        panels[0].set_ylabel("estimated")
        path = folder / "curvature.png"
        figure.savefig(path, dpi=150)
    return [path]

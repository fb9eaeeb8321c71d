"""Rank correlation of training-free scores with the losses of NAS-Bench-NLP's recurrent cells.

Klyuchnikov et al., 2020, arXiv 2006.07116; protocol of Serianni & Kalita, 2023, arXiv 2306.00288: the three-layer
network (600, 600, 400), untrained, in evaluation mode, reads the first 70 steps of 50 columns of the Penn Treebank test
split; Kendall's τ_b with the final test loss. Scores are turned so that a higher one predicts a better model.

One row is one architecture with the mean loss of its trainings, or (`--rows runs`) one training, as published.
Intervals are a bootstrap by `group`: isomorphic cells are drawn together. Cells that the shipped predictor was fitted
to are left out of its row.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t

from lmnas.cli.score import Protocol, Values, batch_of_text, check_metrics, score, score_all
from lmnas.core.errors import UserError
from lmnas.core.files import append_line
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import rng
from lmnas.core.text import columns
from lmnas.methods.proxies import predictor
from lmnas.methods.proxies.recurrent import METRICS
from lmnas.methods.proxies.statistics import Undefined, rank_correlations
from lmnas.runs.build import covering_space
from lmnas.spaces.recurrent.graph import RecurrentGraph
from lmnas.spaces.recurrent.published import FILE, nas_bench_nlp

HELP = "rank the recurrent cells of NAS-Bench-NLP by training-free scores, against their published losses"
INNER, WIDTH = (600, 600), 400
DEFAULT = (
    "hidden_covariance_1",
    "hidden_covariance_2",
    "hidden_covariance_3",
    "activation_distance",
    "parameters",
    "operations",
    "prior",
    "predictor",
)
"""Metrics of one forward pass; the gradients of the others take ten times as long."""
PUBLISHED = {
    "hidden_covariance_1": 0.372,
    "hidden_covariance_2": 0.314,
    "hidden_covariance_3": 0.247,
    "more_noised_jacobian_cosine": 0.280,
    "more_noised_jacobian": 0.273,
    "large_noise_jacobian_cosine": 0.273,
    "hidden_saliency": 0.268,
    "jacobian_cosine": 0.264,
    "large_noise_jacobian": 0.259,
    "activation_distance": 0.223,
    "synaptic_saliency": 0.122,
    "parameters": -0.001,
}
"""τ over the 8,794 published rows (one a training), in the direction of METRICS. The published Jacobian covariance is
of the embedded words, not of gradients, and is no reference."""
N_SPEED, N_RESAMPLES = 4, 1000
N_POOLS, POOL = 20, 200
"""Simulated searches, and candidates of each."""
EVALUATIONS = (1, 2, 5, 10, 20, 50, 100)
REPLAYED = ("hidden_covariance_1", "operations", "prior", "predictor")
"""Orders of the regret's picture, where they were asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help=f"the table, or a folder with its {FILE}")
    parser.add_argument("--corpus", default="ptb", help="the text that the networks read (default: ptb)")
    parser.add_argument("--limit", type=int, help="number of architectures to score, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0, help="of weights, noise, --limit and resampling")
    parser.add_argument("--metrics", help="names separated by commas, or all (default: those without gradients)")
    parser.add_argument("--rows", choices=["cells", "runs"], default="cells", help="what is one row (default: cells)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default: 2)")
    parser.add_argument("--cache", type=Path, help="a file that keeps every value: the same command continues")


def read_table(data: str) -> list[dict[str, Any]]:
    """The entries whose Penn Treebank loss is known.

    Raises:
        UserError: no such file, or a line that is no entry.
    """
    entries = []
    for number, cell in enumerate(nas_bench_nlp(data, "--data"), start=1):
        genotype = Genotype(RecurrentGraph.name, cell.recipe)
        try:
            covering_space(genotype)
        except UserError as error:
            raise UserError(f"--data {data}, line {number}: {error}") from None
        if cell.loss is not None:
            entries.append(
                {"id": cell.id, "group": cell.group, "genotype": genotype, "loss": cell.loss, "runs": cell.scored}
            )
    if not entries:
        raise UserError(f"--data {data}: no entry has a Penn Treebank loss")
    return entries


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Score the architectures and correlate; the JSON document."""
    for option in ("limit", "workers"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}: expected at least 1, got {value}")
    metrics = check_metrics(options.metrics, DEFAULT, RecurrentGraph())
    entries = read_table(options.data)
    if options.limit is not None and options.limit < len(entries):
        entries = rng(options.seed, "limit").sample(entries, options.limit)
    protocol = Protocol(options.corpus, "test", WIDTH, INNER, options.seed)
    began = time.monotonic()
    values, n_new = _values(entries, metrics, protocol, options, say)
    seconds = time.monotonic() - began
    document: dict[str, Any] = {"metrics": {}, "undefined": {}, "points": {}}
    for name in metrics:
        kept = [i for i, found in enumerate(values) if not isinstance(found[name], str)]
        if name == "predictor":
            seen = fitted_groups()
            kept = [i for i in kept if entries[i]["group"] not in seen]
        sign = METRICS[name].sign if name in METRICS else 1
        rows = [
            (sign * float(values[i][name]), -loss, entries[i]["group"])
            for i in kept
            for loss in (entries[i]["runs"] if options.rows == "runs" else [entries[i]["loss"]])
        ]
        document["undefined"][name] = sum(isinstance(found[name], str) for found in values)
        scores, goodness, groups = ([row[side] for row in rows] for side in range(3))
        try:
            document["metrics"][name] = rank_correlations(scores, goodness, groups, options.seed, N_RESAMPLES)
        except Undefined as reason:
            say(f"{name}: no correlation ({reason})")
            continue
        document["points"][name] = [[float(f"{row[0]:.6g}"), -row[1]] for row in rows]
    return {
        **document,
        "regret": regret(entries, values, metrics, options.seed),
        "published": {name: PUBLISHED[name] for name in metrics if name in PUBLISHED},
        "n_architectures": len(entries),
        "rows": options.rows,
        "seed": options.seed,
        "workers": options.workers,
        "seconds": round(seconds, 2),
        "architectures_per_second": round(n_new / seconds, 3) if n_new else None,
        "speed": speed([entry["genotype"] for entry in entries[:N_SPEED]], metrics, protocol, options.workers),
    }


def _values(
    entries: Sequence[Mapping[str, Any]],
    metrics: list[str],
    protocol: Protocol,
    options: argparse.Namespace,
    say: Callable[[str], None],
) -> tuple[list[Values], int]:
    """The values of every entry, from the cache or measured, and how many were measured."""
    key = {"seed": protocol.seed, "corpus": protocol.data}
    known: dict[str, Values] = {}
    if options.cache is not None and options.cache.is_file():
        for line in options.cache.read_text(encoding="utf-8").splitlines():
            try:
                stored = json.loads(line)
                if {name: stored[name] for name in key} == key:
                    known.setdefault(stored["genotype"], {}).update(stored["values"])
            except (ValueError, KeyError, TypeError):
                continue  # a torn line: measured again
    missing = [e for e in entries if not known.get(e["genotype"].id, {}).keys() >= set(metrics)]
    done = score_all([e["genotype"] for e in missing], protocol, metrics, options.workers)
    for number, (entry, found) in enumerate(zip(missing, done, strict=True), start=1):
        known.setdefault(entry["genotype"].id, {}).update(found)
        if options.cache is not None:
            append_line(options.cache, json.dumps({**key, "genotype": entry["genotype"].id, "values": found}))
        if number % 20 == 0 or number == len(missing):
            say(f"[{number}/{len(missing)}] architectures scored")
    return [known[entry["genotype"].id] for entry in entries], len(missing)


def regret(
    entries: Sequence[Mapping[str, Any]], values: Sequence[Values], metrics: Sequence[str], seed: int
) -> dict[str, Any]:
    """Searches replayed on the table: candidates trained in the order of a score, or at random.

    Every search has a pool of POOL architectures, drawn by (seed, k); those without a score are trained last, and cells
    that the predictor was fitted to are in no pool.

    Returns:
        `evaluations`, and per order the mean over pools of (best loss so far - best loss of the pool) in nats, and its
        95 % interval (`low`, `high`, Student's t over the pools).
    """
    seen = fitted_groups() if "predictor" in metrics else set()
    usable = [i for i, entry in enumerate(entries) if entry["group"] not in seen]
    size = min(POOL, len(usable))
    counts = [count for count in EVALUATIONS if count <= size]
    curves: dict[str, list[list[float]]] = {name: [] for name in ("random", *metrics)}
    for k in range(N_POOLS if size else 0):
        pool = rng(seed, "pool", k).sample(usable, size)
        best = min(entries[i]["loss"] for i in pool)
        for name, found in curves.items():
            order = pool
            if name != "random":
                sign = METRICS[name].sign if name in METRICS else 1
                keys = {i: math.inf if isinstance(v := values[i][name], str) else -sign * v for i in pool}
                order = sorted(pool, key=keys.__getitem__)
            found.append([min(entries[i]["loss"] for i in order[:count]) - best for count in counts])
    summary: dict[str, Any] = {"evaluations": counts, "pools": N_POOLS, "pool_size": size, "orders": {}}
    for name, found in curves.items():
        columns = list(zip(*found, strict=True))
        means = [statistics.fmean(column) for column in columns]
        errors = [statistics.stdev(column) / math.sqrt(len(column)) for column in columns]
        reach = t.ppf(0.975, N_POOLS - 1)
        summary["orders"][name] = {
            "mean": [round(mean, 5) for mean in means],
            "low": [round(mean - reach * error, 5) for mean, error in zip(means, errors, strict=True)],
            "high": [round(mean + reach * error, 5) for mean, error in zip(means, errors, strict=True)],
        }
    return summary


def fitted_groups() -> set[str]:
    """Groups of the cells that the shipped predictor was fitted to."""
    return set(json.loads(predictor.SHIPPED.read_text(encoding="utf-8"))["provenance"]["groups"])


def speed(genotypes: Sequence[Genotype], metrics: Sequence[str], protocol: Protocol, workers: int) -> dict[str, float]:
    """Architectures a second, side by side: as this benchmark scores them, and one at a time, one metric at a time, in
    a process that leaves PyTorch as it is (`plain`). Each way scores one architecture unmeasured first."""
    metrics = [name for name in metrics if name in METRICS]
    if not metrics or not genotypes:
        return {}
    found = {"n": float(len(genotypes)), "workers": float(workers)}
    documents = [genotype.to_dict() for genotype in genotypes]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        found["plain"] = round(pool.submit(_plain_rate, documents, list(metrics), protocol).result(), 3)
    for name, n in (("one_worker", 1), ("ours", workers)):
        # a worker's first one pays for its start
        queue = [genotypes[0]] * n + list(genotypes)
        arrived = [time.monotonic() for _ in score_all(queue, protocol, list(metrics), n)]
        found[name] = round(len(genotypes) / (arrived[-1] - arrived[n - 1]), 3)
    return found


def _plain_rate(documents: Sequence[dict[str, Any]], metrics: Sequence[str], protocol: Protocol) -> float:
    torch.set_num_threads(1)
    text = batch_of_text(protocol.data, protocol.split)
    genotypes = [Genotype.from_dict(document) for document in documents]
    began = math.nan
    for number, genotype in enumerate([genotypes[0], *genotypes]):
        if number == 1:
            began = time.monotonic()
        for name in metrics if number else metrics[:1]:
            score(covering_space(genotype), genotype, protocol, text, [name])
    return len(genotypes) / (time.monotonic() - began)


def text(document: Mapping[str, Any]) -> str:
    """One line a metric."""
    rows = []
    for name, row in document["metrics"].items():
        published = document["published"].get(name)
        measured = (f"{row[key]:.3f}" for key in ("kendall_tau", "low", "high", "spearman_rho"))
        rows.append([name, *measured, str(row["n"]), "-" if published is None else f"{published:.3f}"])
    replay = document["regret"]
    orders = [
        [name, *(f"{m:.3f} ± {h - m:.3f}" for m, h in zip(row["mean"], row["high"], strict=True))]
        for name, row in replay["orders"].items()
    ]
    lines = [
        columns(["metric", "τ", "95 % from", "to", "ρ", "n", "published τ"], rows),
        "",
        f"regret in nats after so many trainings, mean of {replay['pools']} searches with pools of "
        f"{replay['pool_size']} ± half of the 95 % interval",
        columns(["order", *map(str, replay["evaluations"])], orders),
    ]
    speed = document["speed"]
    if speed:
        lines.append("")
        lines.append(
            f"architectures a second: {speed['ours']:g} with {speed['workers']:g} processes, {speed['one_worker']:g} "
            f"with one, {speed['plain']:g} one metric at a time as PyTorch comes"
        )
    return "\n".join(lines)


def pictures(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """One scatter plot a metric: the score's rank against the published loss."""
    from matplotlib.figure import Figure
    from scipy.stats import rankdata

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, points in document["points"].items():
        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.add_subplot()
        scores, losses = zip(*points, strict=True)
        axes.scatter(rankdata(scores), losses, s=6, alpha=0.5, linewidths=0)
        axes.set_xlabel(f"rank by {name} (higher predicts better)")
        axes.set_ylabel("test loss on Penn Treebank, nats per word")
        finite = [loss for loss in losses if math.isfinite(loss)]
        axes.set_ylim(min(finite) - 0.05, sorted(finite)[int(0.99 * (len(finite) - 1))] + 0.1)
        axes.set_title(f"τ = {document['metrics'][name]['kendall_tau']:.3f}, n = {len(points)}")
        path = folder / f"nas-bench-nlp-{name}.png"
        figure.savefig(path, dpi=130)
        paths.append(path)
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.add_subplot()
    replay = document["regret"]
    shown = [name for name in ("random", *REPLAYED) if name in replay["orders"]] or list(replay["orders"])
    for name in shown:
        row = replay["orders"][name]
        axes.plot(replay["evaluations"], row["mean"], label=name, linestyle="--" if name == "random" else "-")
        axes.fill_between(replay["evaluations"], row["low"], row["high"], alpha=0.15)
    axes.set_xscale("log")
    axes.set_xlabel("trainings")
    axes.set_ylabel("regret of the test loss, nats per word")
    axes.set_title(f"{replay['pools']} searches with pools of {replay['pool_size']}, 95 % intervals", fontsize=9)
    axes.legend(fontsize=7)
    paths.append(folder / "nas-bench-nlp-regret.png")
    figure.savefig(paths[-1], dpi=130)
    return paths

"""How well training-free scores rank the recurrent cells of NAS-Bench-NLP.

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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lmnas.errors import UserError
from lmnas.files import append_line
from lmnas.genotype import Genotype
from lmnas.jobs import covering_space
from lmnas.proxies import predictor
from lmnas.proxies.recurrent import METRICS
from lmnas.proxies.statistics import Undefined, rank_correlations
from lmnas.score import Protocol, Values, batch_of_text, check_metrics, score, score_all
from lmnas.seeds import rng

HELP = "rank the recurrent cells of NAS-Bench-NLP by training-free scores, against their published losses"
NAME = "architectures.jsonl"
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
"""What one forward pass gives; the gradients of the others take ten times as long."""
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
N_SPEED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help=f"the table, or a folder with its {NAME}")
    parser.add_argument("--corpus", default="ptb", help="the text that the networks read (default: ptb)")
    parser.add_argument("--limit", type=int, help="score so many architectures, drawn by the seed")
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
    path = Path(data)
    path = path / NAME if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: cannot be read ({error})") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            recipe, group, ptb = entry["recipe"], entry["group"], entry["ptb"]
            losses = [run["test_loss"] for run in ptb["runs"] if run["test_loss"] is not None]
            # runs that the published table leaves out count only where the file does not say
            scored = [
                run["test_loss"] for run in ptb["runs"] if run.get("scored", True) and run["test_loss"] is not None
            ]
            mean = ptb.get("test_loss_mean")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"--data {path}, line {number}: expected an entry with id, group, recipe and ptb.runs"
            ) from None
        genotype = Genotype("recurrent-graph", recipe)
        try:
            covering_space(genotype)
        except UserError as error:
            raise UserError(f"--data {path}, line {number}: {error}") from None
        if losses:
            mean = sum(losses) / len(losses) if mean is None else mean
            entries.append({"id": entry["id"], "group": str(group), "genotype": genotype, "loss": mean, "runs": scored})
    if not entries:
        raise UserError(f"--data {path}: no entry has a Penn Treebank loss")
    return entries


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Score the architectures and correlate; the JSON document."""
    for option in ("limit", "workers"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option}: expected at least 1, got {value}")
    metrics = check_metrics(options.metrics, DEFAULT)
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
            document["metrics"][name] = rank_correlations(scores, goodness, groups, options.seed)
        except Undefined as reason:
            say(f"{name}: no correlation ({reason})")
            continue
        document["points"][name] = [[float(f"{row[0]:.6g}"), -row[1]] for row in rows]
    return {
        **document,
        "published": {name: PUBLISHED[name] for name in metrics if name in PUBLISHED},
        "n_architectures": len(entries),
        "rows": options.rows,
        "seed": options.seed,
        "workers": options.workers,
        "seconds": round(seconds, 2),
        "architectures_per_second": round(n_new / seconds, 3) if n_new else None,
        "speed": speed([entry["genotype"] for entry in entries[:N_SPEED]], metrics, protocol),
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


def fitted_groups() -> set[str]:
    """Groups of the cells that the shipped predictor was fitted to."""
    return set(json.loads(predictor.SHIPPED.read_text(encoding="utf-8"))["provenance"]["groups"])


def speed(genotypes: Sequence[Genotype], metrics: Sequence[str], protocol: Protocol) -> dict[str, float]:
    """Architectures a second on one thread: metrics that share their passes, and each with passes of its own."""
    metrics = [name for name in metrics if name in METRICS]
    if not metrics:
        return {}
    text = batch_of_text(protocol.data, protocol.split)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {"n": float(len(genotypes))}
    try:
        for way, parts in (("shared", [metrics]), ("one_by_one", [[name] for name in metrics])):
            began = time.monotonic()
            for genotype in genotypes:
                for part in parts:
                    score(covering_space(genotype), genotype, protocol, text, part)
            found[way] = round(len(genotypes) / (time.monotonic() - began), 3)
    finally:
        torch.set_num_threads(threads)
    return found


def text(document: Mapping[str, Any]) -> str:
    """One line a metric."""
    lines = [f"{'metric':<30}{'τ':>8}{'95 % interval':>18}{'ρ':>8}{'n':>7}{'published τ':>13}"]
    for name, row in document["metrics"].items():
        published = document["published"].get(name)
        lines.append(
            f"{name:<30}{row['kendall_tau']:>8.3f}{row['low']:>10.3f} {row['high']:>7.3f}{row['spearman_rho']:>8.3f}"
            f"{row['n']:>7}{'-' if published is None else f'{published:.3f}':>13}"
        )
    speed = document["speed"]
    if speed:
        lines.append(
            f"architectures a second, one thread: {speed['shared']:g} with shared passes, {speed['one_by_one']:g} one "
            "metric at a time"
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
    return paths

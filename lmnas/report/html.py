"""The report of a run: one HTML file that needs no network, written from the records in the run directory alone.

Any record may be missing while a run is unfinished; the report then says what is still to come. The page's words and
layout are in `templates/`, with every value escaped; this module gathers what they show.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmnas.core.contracts import Diagram, Objective
from lmnas.core.events import read_events
from lmnas.core.files import write_atomic
from lmnas.core.names import JobName
from lmnas.core.text import seconds_text
from lmnas.report import diagram, plots, tables
from lmnas.report.blocks import Block, Context, Data, Figure, Table, known, rendered
from lmnas.report.plots import Curve
from lmnas.report.verdict import SEARCHED, format_value

Records = Mapping[str, Any]

STAGES = {"search": "search", "select": "selection", "train": "training", "test": "test"}
CURVES = {"search": "Search", "select": "Selection: short training of the best", "train": "Training"}
"""Stages with learning curves, and their captions."""
SHOWN = 30
"""Candidates listed per stage; a search may have thousands."""
NOUN = "cell"
"""Noun for an architecture where the records have none: those of 0.1.0."""

THEME = {
    plots.INK: "ink",
    plots.FAINT: "faint",
    plots.GRID: "line",
    plots.PAPER: "paper",
    plots.INPUT_FILL: "input",
    plots.OUTPUT_FILL: "output",
}
"""Colours of the figures -> the page's variables, which have a light and a dark value."""


@dataclass(frozen=True)
class Candidate:
    """One row of the candidates' tables, as text."""

    architecture: str
    source: str
    seed: str
    split: str
    value: str
    failure: str
    is_proxy: bool


@dataclass(frozen=True)
class Stage:
    """The best candidates of one stage, failures last, and how many `more` there were."""

    title: str
    measure: str
    rows: Sequence[Candidate]
    more: int


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into `run_dir` from its records and return its path."""
    results, problem = _read_results(run_dir / "results.json")
    curves = _read_curves(run_dir / "jobs", results)
    recipe = run_dir / "recipe.yaml"
    objective = Objective(**{"name": "score", "unit": "", "direction": "minimize"} | (results.get("objective") or {}))
    page = (
        _templates()
        .get_template("report.html.j2")
        .render(
            name=results.get("name") or run_dir.resolve().name,
            problem=problem,
            noun=results.get("noun") or NOUN,
            recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
            **_head(results, curves, objective),
            **_architecture(results),
            **_curves(curves, objective),
            **_candidates(results.get("candidates") or [], objective),
            **_details(results.get("details") or {}, objective),
            **_data(results),
        )
    )
    path = run_dir / "report.html"
    write_atomic(path, page)
    return path


def _templates() -> Environment:
    """The templates; figures of one page are numbered, which keeps the ids inside them apart."""
    folder = Path(__file__).parent / "templates"
    made = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    numbers = count()
    made.filters["inline"] = lambda svg: _inline(svg, f"figure-{next(numbers)}")
    return made


def _inline(svg: str, name: str) -> str:
    """An SVG file as a part of the page: ids made unique, colours the page's, no addresses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = svg.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


# --------------------------------------------------------------------------------------------------------- records


def _read_results(path: Path) -> tuple[Records, str]:
    """The results, and what is wrong with the file (empty text: nothing)."""
    if not path.exists():
        return {}, ""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return {}, f"results.json cannot be read ({error})."
    return (results, "") if isinstance(results, dict) else ({}, "results.json is no JSON object.")


def _read_curves(jobs: Path, results: Records) -> list[Curve]:
    """The events of every job, in order of name; a selection job's model is the source of its candidate."""
    sources = {row.get("genotype_id"): row.get("source") for row in results.get("candidates") or []}
    curves = []
    for path in sorted(jobs.glob("*/events.jsonl")):
        name = JobName.parse(path.parent.name)
        if name is None or name.stage not in CURVES or name.seed is None:
            continue
        model = {"select": sources.get(name.subject), "train": name.subject}.get(name.stage) or SEARCHED
        curves.append(Curve(name.stage, model, name.seed, read_events(path)))
    return curves


def _reached(results: Records, curves: Iterable[Curve]) -> str | None:
    """The latest stage that left a record."""
    stages = {curve.stage for curve in curves} | {row.get("stage") for row in results.get("candidates") or []}
    stages |= {"test" if score.get("split") == "test" else "train" for score in results.get("scores") or []}
    return next((stage for stage in reversed(STAGES) if stage in stages), None)


# -------------------------------------------------------------------------------------------------------- sections


def _head(results: Records, curves: Sequence[Curve], objective: Objective) -> dict[str, Any]:
    verdict, scores = results.get("verdict"), results.get("scores") or []
    columns = ["model", "seed", "split", objective.name, "predictions", "architecture"]
    rows = [
        [
            str(score.get("model", "-")),
            str(score.get("seed", "-")),
            str(score.get("split", "-")),
            "diverged" if (value := format_value(score.get("value"))) == "-" else value,
            tables.format_count(score.get("n_predictions")),
            str(score.get("genotype_id") or "-"),
        ]
        for score in scores
    ]
    better = "lower" if objective.direction == "minimize" else "higher"
    unit = f", {objective.unit}" if objective.unit else ""
    return {
        "sentence": verdict["sentence"] if verdict else _to_come(_reached(results, curves)),
        "verdict": Table(tables.header(verdict, objective), tables.rows(verdict)) if verdict else None,
        "measure": f"{objective.name.capitalize()}{unit}; {better} is better.",
        "scores": Table(columns, rows, title=f"Every score ({len(rows)})", folded=True),
    }


def _to_come(reached: str | None) -> str:
    to_come = list(STAGES.values())
    if reached:
        to_come = to_come[list(STAGES).index(reached) + 1 :]
    begin = f"This run is not finished: it has reached the {STAGES[reached]} stage." if reached else "Just started."
    return f"{begin} Still to come: {', '.join([*to_come, 'verdict'])}."


def _architecture(results: Records) -> dict[str, Any]:
    genotype, drawing = results.get("genotype") or {}, results.get("diagram") or {}
    shown: dict[str, Any] = {
        "genotype": {"id": None, "space": None, **genotype} if genotype else None,
        "choices": Data("Genotype", json.dumps(genotype, indent=2)),
        "drawing": None,
    }
    if drawing.get("nodes"):
        graph = Diagram(
            str(drawing.get("title", "")), tuple(map(tuple, drawing["nodes"])), tuple(map(tuple, drawing["edges"]))
        )
        buffer = io.BytesIO()
        diagram.draw(graph, buffer)
        shown["drawing"] = Figure(buffer.getvalue().decode())
        shown["in_words"] = Table(["node", "reads"], _in_words(graph), numbers=(), title="In words", folded=True)
    return shown


def _in_words(graph: Diagram) -> list[list[str]]:
    labels = {key: label.replace("\n", " ") for key, label, _ in graph.nodes}
    reads: dict[str, list[str]] = {key: [] for key in labels}
    for source, target, label in graph.edges:
        reads[target].append(labels[source] + (f" through {label}" if label else ""))
    return [[labels[key], ", ".join(sources)] for key, sources in reads.items() if sources]


def _curves(curves: Sequence[Curve], objective: Objective) -> dict[str, list[Block]]:
    """Learning curves by stage, and how the choice moved: curves of all searches, then each one's panels."""
    learning: list[Block] = []
    for stage, caption in CURVES.items():
        if svg := plots.learning_curves([curve for curve in curves if curve.stage == stage], objective):
            learning.append(Figure(svg, caption))
    searches = [curve for curve in curves if curve.stage == "search"]
    moved: list[Block] = [Figure(svg, caption) for caption, svg in plots.search_curves(searches)]
    for curve in searches:
        last = curve.last_statistics()
        moved += known(last, Context(last, curve.seed, tables.items(objective)))
    return {"learning": learning, "search": moved}


def _candidates(candidates: Sequence[Records], objective: Objective) -> dict[str, Any]:
    plot = plots.candidate_plot(candidates, objective)
    titles = {"select": "After short training", "search": "During the search"}
    by_stage = {title: [row for row in candidates if row.get("stage") == stage] for stage, title in titles.items()}
    failures = Counter(row["failure"] for row in candidates if row.get("failure"))
    rows = [[cause, str(n)] for cause, n in failures.most_common()]
    return {
        "pairs": plot and Figure(plot[1], plot[0]),
        "stages": [_stage(title, rows, objective) for title, rows in by_stage.items() if rows],
        "any_proxy": any(row.get("is_proxy") for row in candidates),
        "failures": Table(["cause", "candidates"], rows, title="Failures"),
    }


def _stage(title: str, candidates: Sequence[Records], objective: Objective) -> Stage:
    def key(row: Records) -> float:
        return objective.key(float("nan") if row.get("value") is None else row["value"])

    def text(value: Any) -> str:
        return "-" if value is None else str(value)

    rows = [
        Candidate(
            text(row.get("genotype_id")),
            text(row.get("source")),
            text(row.get("search_seed")),
            text(row.get("split")),
            format_value(row.get("value")),
            row.get("failure") or "",
            bool(row.get("is_proxy")),
        )
        for row in sorted(candidates, key=key)[:SHOWN]
    ]
    # a training-free score has no unit of the task's; that of shared weights does
    measure = "proxy score" if all(row.get("is_proxy") for row in candidates) else objective.name
    return Stage(title, measure, rows, len(candidates) - len(rows))


def _details(details: Records, objective: Objective) -> dict[str, Any]:
    """Blocks of the details that the task gave with the test score of the model that is handed over."""
    entries = {name: value for name, value in details.items() if name not in ("model", "seed")}
    seed = details.get("seed")
    return {"details": rendered(entries, Context(details, seed, tables.items(objective))), "details_seed": seed}


def _data(results: Records) -> dict[str, Table]:
    shown: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for name, value in (results.get("data") or {}).items():
        if isinstance(value, dict):  # counts by split
            counts |= {f"{split} {name}": n for split, n in value.items()}
        else:
            shown[name] = value
    return {
        "data": _pairs(shown | counts),
        "costs": _pairs(results.get("costs") or {}, title="What it cost"),
        "environment": _pairs(results.get("environment") or {}),
    }


def _pairs(pairs: Records, title: str = "") -> Table:
    """A table of names and values; whole numbers get their thousands apart, times read as times."""
    rows = []
    for key, value in pairs.items():
        if isinstance(value, (dict, list)):
            value = json.dumps(value)
        elif key.endswith("_seconds") and isinstance(value, (int, float)):
            key, value = key.removesuffix("_seconds"), seconds_text(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        rows.append([str(key).replace("_", " "), "-" if value is None else str(value)])
    return Table([], rows, numbers=(), title=title)

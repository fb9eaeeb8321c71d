"""The report of a run: one HTML file that needs no network, written from the records in the run directory alone.

Any record may be missing while a run is unfinished; the report then says what is still to come.
"""

import html
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmnas.core.contracts import Diagram, Objective
from lmnas.core.files import read_events, write_atomic
from lmnas.report import diagram as cells
from lmnas.report import plots, tables
from lmnas.report.plots import Curve
from lmnas.report.verdict import SEARCHED, format_value

Records = Mapping[str, Any]

STAGES = {"search": "search", "select": "selection", "train": "training", "test": "test"}
JOB = re.compile(r"(search|select|train)(?:-(.+))?-(\d+)")
"""Name of a job's folder: stage, what it trains (a genotype's id or a model), seed."""
CONFUSED = 8
"""Pairs of classes listed as the most frequent mistakes."""
SHOWN = 30
"""Candidates listed per stage; a search may have thousands."""

THEME = {
    plots.INK: "ink",
    plots.FAINT: "faint",
    plots.GRID: "line",
    plots.PAPER: "paper",
    plots.INPUT_FILL: "input",
    plots.OUTPUT_FILL: "output",
}
"""Colours of the figures -> the page's variables, which have a light and a dark value."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fefefe; --ink: #1b2733; --faint: #5b6873; --line: #d9dee3; --panel: #f4f6f8; --input: #cfe3f7;
  --output: #d3edda; --accent: #2f7fd1; --warn: #a4530a }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181d; --ink: #e4e8ec; --faint: #98a4af; --line: #323b45; --panel: #1d232a; --input: #1f3f5f;
  --output: #21482f; --accent: #6aabec; --warn: #eba25c } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.1rem; color: var(--faint); font-weight: 600; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
.verdict { font-size: 1.25rem; line-height: 1.4; margin: .5rem 0 1rem; max-width: 60rem;
  border-left: 4px solid var(--accent); padding-left: .8rem }
.faint, figcaption { color: var(--faint); font-size: .9rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: 600 }
.number { text-align: right; white-space: nowrap }
.tag { font-size: .78rem; color: var(--warn); border: 1px solid; border-radius: .6rem; padding: 0 .4rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
figure { margin: .5rem 0; overflow-x: auto }
figure svg { height: auto; max-width: 100% }
figure.cell svg { max-width: none }
svg text { font-family: system-ui, sans-serif !important }
pre { background: var(--panel); padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.4;
  border-radius: .3rem }
summary { cursor: pointer; margin-top: .8rem }
"""

CONTINUE = """
<p>To continue this run, give the same command again: what is finished is kept. The architecture
on its own, once it is chosen:</p>
<pre>from lmnas.core.genotype import load_genotype

genotype = load_genotype("genotype.json")  # in this folder; the trained weights are in model.safetensors</pre>
"""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into `run_dir` from its records and return its path."""
    results, problem = _read_results(run_dir / "results.json")
    curves = _read_curves(run_dir / "jobs", results)
    recipe_path = run_dir / "recipe.yaml"
    recipe = recipe_path.read_text(encoding="utf-8", errors="replace") if recipe_path.exists() else ""
    objective = Objective(**{"name": "score", "unit": "", "direction": "minimize"} | (results.get("objective") or {}))
    name = results.get("name") or run_dir.resolve().name
    sections = [
        _head(name, results, curves, objective, problem),
        _cell(results),
        _learning(curves, objective),
        _search(curves),
        _candidates(results.get("candidates") or [], objective),
        _predictions(results.get("details") or {}),
        _data(results),
        _section("Environment", _pairs(results.get("environment") or {}) or _absent("Nothing is recorded yet.")),
        _section("Recipe", f"<pre>{_text(recipe)}</pre>" if recipe else _absent("There is no recipe.yaml.")),
        _section("Continue or reuse it", CONTINUE),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(name)} - lmnas</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )
    path = run_dir / "report.html"
    write_atomic(path, page)
    return path


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
        if match := JOB.fullmatch(path.parent.name):
            stage, what, seed = match.groups()
            models = {"select": sources.get(what), "train": what}
            model = models.get(stage) or SEARCHED
            curves.append(Curve(stage, model, int(seed), read_events(path)))
    return curves


def _reached(results: Records, curves: Sequence[Curve]) -> str | None:
    """The latest stage that left a record."""
    stages = {curve.stage for curve in curves} | {row.get("stage") for row in results.get("candidates") or []}
    stages |= {"test" if score.get("split") == "test" else "train" for score in results.get("scores") or []}
    return next((stage for stage in reversed(STAGES) if stage in stages), None)


# -------------------------------------------------------------------------------------------------------- sections


def _head(name: str, results: Records, curves: Sequence[Curve], objective: Objective, problem: str) -> str:
    parts = [f"<h1>{_text(name)}</h1>"]
    verdict = results.get("verdict")
    if verdict:
        parts.append(f'<p class="verdict">{_text(verdict["sentence"])}</p>')
        parts.append(_table(tables.header(verdict, objective), tables.rows(verdict)))
        better = "lower" if objective.direction == "minimize" else "higher"
        unit = f", {objective.unit}" if objective.unit else ""
        parts.append(f'<p class="faint">{_text(f"{objective.name.capitalize()}{unit}; {better} is better.")}</p>')
    else:
        reached = _reached(results, curves)
        to_come = list(STAGES.values())
        to_come = to_come[list(STAGES).index(reached) + 1 :] if reached else to_come
        text = (
            f"This run is not finished: it has reached the {STAGES[reached]} stage. " if reached else "Just started. "
        )
        text += f"Still to come: {', '.join([*to_come, 'verdict'])}."
        parts.append(f'<p class="verdict">{_text(text)}</p>')
    if problem:
        parts.append(f"<p>{_text(problem)}</p>")
    scores = results.get("scores") or []
    if scores:
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
        parts.append(_details(f"Every score ({len(rows)})", _table(columns, rows)))
    return "\n".join(parts)


def _cell(results: Records) -> str:
    genotype, drawing = results.get("genotype") or {}, results.get("diagram") or {}
    parts = []
    if genotype.get("id"):
        parts.append(f"<p>Space {_text(genotype.get('space', '-'))}, id <code>{_text(genotype['id'])}</code></p>")
    if drawing.get("nodes"):
        diagram = Diagram(
            str(drawing.get("title", "")), tuple(map(tuple, drawing["nodes"])), tuple(map(tuple, drawing["edges"]))
        )
        buffer = io.BytesIO()
        cells.draw(diagram, buffer)
        parts.append(_figure(buffer.getvalue().decode(), "", "cell", class_name="cell"))
        parts.append(_details("In words", _table(["node", "reads"], _in_words(diagram), numbers=())))
    if genotype:
        parts.append(_details("Genotype", f"<pre>{_text(json.dumps(genotype, indent=2))}</pre>"))
    return _section("The cell", "\n".join(parts) or _absent("The search has not chosen one yet."))


def _in_words(diagram: Diagram) -> list[list[str]]:
    labels = {key: label.replace("\n", " ") for key, label, _ in diagram.nodes}
    reads: dict[str, list[str]] = {key: [] for key in labels}
    for source, target, label in diagram.edges:
        reads[target].append(labels[source] + (f" through {label}" if label else ""))
    return [[labels[key], ", ".join(sources)] for key, sources in reads.items() if sources]


def _learning(curves: Sequence[Curve], objective: Objective) -> str:
    figures = []
    for stage in ("search", "select", "train"):
        svg = plots.learning_curves([curve for curve in curves if curve.stage == stage], objective)
        if svg:
            caption = {"search": "Search", "select": "Selection: short training of the best", "train": "Training"}[
                stage
            ]
            figures.append(_figure(svg, caption, f"learning-{stage}"))
    note = (
        '<p class="faint">One thin line per seed. Dot: weight averaging starts. '
        "Cross: training diverged there and was set back.</p>"
    )
    return _section("Learning curves", _grid(figures) + note if figures else _absent("No epoch is finished yet."))


def _search(curves: Sequence[Curve]) -> str:
    pairs = plots.search_curves([curve for curve in curves if curve.stage == "search"])
    figures = [_figure(svg, caption, f"search-{i}") for i, (caption, svg) in enumerate(pairs)]
    return _section(
        "How the choice moved", _grid(figures) if figures else _absent("The search recorded no weights or entropy.")
    )


def _candidates(candidates: Sequence[Records], objective: Objective) -> str:
    parts = []
    plot = plots.candidate_plot(candidates, objective)
    if plot:
        caption, svg = plot
        parts.append(_grid([_figure(svg, caption, "candidates")]))
    for stage, title in (("select", "After short training"), ("search", "During the search")):
        rows = [row for row in candidates if row.get("stage") == stage]
        if rows:
            parts += [f"<h3>{title}</h3>", _candidate_table(rows, objective)]
    if any(row.get("is_proxy") for row in candidates):
        parts.append(
            '<p class="faint">A <span class="tag">proxy</span> score ranks candidates and is no result: '
            "weights were shared with other candidates, or not trained.</p>"
        )
    failures = Counter(row["failure"] for row in candidates if row.get("failure"))
    if failures:
        rows_ = [[cause, str(count)] for cause, count in failures.most_common()]
        parts += ["<h3>Failures</h3>", _table(["cause", "candidates"], rows_)]
    return _section("Candidates", "\n".join(parts) or _absent("None is scored yet."))


def _candidate_table(candidates: Sequence[Records], objective: Objective) -> str:
    """The best of one stage, failures last."""

    def key(row: Records) -> float:
        return objective.key(float("nan") if row.get("value") is None else row["value"])

    rows = []
    for row in sorted(candidates, key=key)[:SHOWN]:
        value = _text(format_value(row.get("value")))
        if row.get("failure"):
            value = f"failed: {_text(row['failure'])}"
        elif row.get("is_proxy"):
            value += ' <span class="tag">proxy</span>'
        seed = row.get("search_seed")
        rows.append(
            [
                f"<code>{_text(row.get('genotype_id', '-'))}</code>",
                _text(row.get("source", "-")),
                "-" if seed is None else _text(seed),
                _text(row.get("split", "-")),
                value,
            ]
        )
    more = len(candidates) - len(rows)
    note = f'<p class="faint">and {more:,} more, in results.json</p>' if more > 0 else ""
    # a training-free score has no unit of the task's; that of shared weights does
    name = "proxy score" if candidates and all(row.get("is_proxy") for row in candidates) else objective.name
    columns = ["architecture", "source", "search seed", "split", _text(name)]
    return _markup_table(columns, rows, numbers=()) + note


def _predictions(details: Records) -> str:
    """What the handed-over model predicts on the test split; nothing for tasks without such details."""
    figures, parts = [], []
    names, counts = details.get("classes") or [], details.get("confusion") or []
    if counts:
        if len(counts) <= plots.LARGEST_TABLE:
            parts.append(_figure(plots.confusion_table(names, counts), "True classes against predicted", "confusion"))
        found = sorted(
            (
                (count, true, taken)
                for true, row in enumerate(counts)
                for taken, count in enumerate(row)
                if true != taken
            ),
            key=lambda entry: (-entry[0], entry[1:]),
        )
        rows = [[names[true], names[taken], str(count)] for count, true, taken in found[:CONFUSED] if count]
        if rows:
            table = _table(["class", "taken for", "images"], rows, numbers=(2,))
            parts += ["<h3>Most frequent mistakes</h3>", table]
        wrong = [
            [name, f"{sum(row):,}", _share(sum(row) - row[i], sum(row))]
            for i, (name, row) in enumerate(zip(names, counts, strict=True))
        ]
        parts.append(_details("By class", _table(["class", "images", "error"], wrong)))
    measured = details.get("calibration") or {}
    if measured.get("bins"):
        figures.append(
            _figure(
                plots.reliability(measured["bins"]),
                f"Confidence against accuracy; expected calibration error {100 * measured['error']:.2f} % over "
                f"{len(measured['bins'])} bins",
                "reliability",
            )
        )
    if not figures and not parts:
        return ""
    note = (
        f'<p class="faint">On the test split, by the model that is handed over (seed {_text(details.get("seed"))}).</p>'
    )
    return _section("What it predicts", "\n".join([note, *parts, _grid(figures)]))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _data(results: Records) -> str:
    data, costs = results.get("data") or {}, results.get("costs") or {}
    parts = []
    if data:
        shown = {key: value for key, value in data.items() if key not in ("tokens", "images")}
        for items in ("tokens", "images"):
            shown |= {f"{split} {items}": count for split, count in (data.get(items) or {}).items()}
        parts.append(_pairs(shown))
    if costs:
        parts += ["<h3>What it cost</h3>", _pairs(costs)]
    return _section("Data", "\n".join(parts) or _absent("Nothing is recorded yet."))


# ---------------------------------------------------------------------------------------------------------- markup


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>"


def _absent(text: str) -> str:
    return f'<p class="faint">{text}</p>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>\n{content}\n</details>"


def _pairs(pairs: Records) -> str:
    """A table of names and values; whole numbers get their thousands apart, times read as times."""
    rows = []
    for key, value in pairs.items():
        if isinstance(value, (dict, list)):
            value = json.dumps(value)
        elif key.endswith("_seconds") and isinstance(value, (int, float)):
            key, value = key.removesuffix("_seconds"), _duration(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        rows.append([str(key).replace("_", " "), "-" if value is None else str(value)])
    return _table([], rows, numbers=()) if rows else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] | None = None) -> str:
    """A table of plain text; `numbers` are the columns set flush right, all but the first unless given."""
    return _markup_table([_text(column) for column in columns], [[*map(_text, row)] for row in rows], numbers)


def _markup_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] | None = None) -> str:
    """As `_table`, of cells that are markup already."""
    width = max(map(len, [columns, *rows]))
    flush = range(1, width) if numbers is None else numbers
    attributes = [' class="number"' if i in flush else "" for i in range(width)]

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}{attributes[i]}>{cell}</{tag}>" for i, cell in enumerate(cells)) + "</tr>"

    head = f"<thead>{line(columns, 'th')}</thead>" if columns else ""
    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>'


def _figure(svg: str, caption: str, name: str, class_name: str = "plot") -> str:
    note = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure class="{class_name}">{note}{_inline(svg, name)}</figure>'


def _inline(svg: str, name: str) -> str:
    """An SVG file as a part of the page: ids made unique, colours the page's, no addresses."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    svg = svg.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for colour, variable in THEME.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg

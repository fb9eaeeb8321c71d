"""The strength of the sparse prior against what is found: size and perplexity over a sweep of lambda.

Every lambda is a whole run of a recipe in the space that keeps all survivors, in a directory of its own, so that the
sweep continues where it was stopped. Above the recipe's lambda the switches' rate is scaled with 1 / lambda, for the
same number of steps to zero; below it the rate stays, as a step of the loss' own gradient must not grow with it.

    python benchmarks/bayes_lambda.py ptb-bayesnas-small --lambdas 0.0003,0.001,0.003,0.01 --out runs/lambda

Leaves `lambda.json` (a row per lambda: living switches, parameters, test value, or why it failed) and `lambda.png`, in
which a line joins those that no other beats in both size and value.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import lmnas
from lmnas.core.contracts import Objective
from lmnas.core.errors import UserError
from lmnas.core.events import read_events
from lmnas.report import plots
from lmnas.runs.recipe import load_recipe


def overrides(recipe: str, strength: float, given: dict[str, Any]) -> dict[str, Any]:
    """Overrides of one run: the sparse space of the recipe's size, this lambda, no baselines."""
    strategy = lmnas.core.registry.settings_of("strategy", load_recipe(recipe, given).strategy, "strategy")
    space = lmnas.core.registry.settings_of("space", load_recipe(recipe, given).space, "space")
    return {
        **given,
        "space": "recurrent-sparse",
        "space.n_nodes": space["n_nodes"],
        "space.activations": list(space["activations"]),
        "strategy.strength": strength,
        "strategy.learning_rate": strategy["learning_rate"] * min(1.0, strategy["strength"] / strength),
        "baselines": {},
    }


def one(recipe: str, strength: float, out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """A row of the sweep."""
    path = out / f"lambda-{strength:g}"
    try:
        run = lmnas.search(recipe, run=path, overrides=overrides(recipe, strength, given))
    except UserError as failure:
        return {"lambda": strength, "failure": str(failure)}
    (model,) = run.results["verdict"]["models"]
    alive = [
        [e for e in read_events(job / "events.jsonl") if e["event"] == "epoch"][-1]["statistics"]["alive"]
        for job in sorted((path / "jobs").glob("search-*"))
        if (job / "prepared.safetensors").is_file()
    ]
    kept = [len(value) for name, value in run.genotype.choices.items() if name.endswith(".inputs")]
    return {
        "lambda": strength,
        "alive": alive,
        "kept": sum(kept),
        "nodes": sum(map(bool, kept)),
        **{key: model[key] for key in ("n_parameters", "mean", "low", "high", "n")},
        "genotype": run.genotype.to_dict(),
    }


def front(rows: list[dict[str, Any]], objective: Objective) -> list[dict[str, Any]]:
    """Rows that no other beats in both parameters and value, by size."""
    ordered = sorted(rows, key=lambda row: (row["n_parameters"], objective.key(row["mean"])))
    best: list[dict[str, Any]] = []
    for row in ordered:
        if not best or objective.better(row["mean"], best[-1]["mean"]):
            best.append(row)
    return best


def draw(rows: list[dict[str, Any]], objective: Objective, path: Path) -> None:
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    for panel, key, label in zip(
        figure.subplots(1, 2, sharey=True), ("n_parameters", "kept"), ("parameters", "living switches"), strict=True
    ):
        for row in rows:
            error = None if row["low"] is None else [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
            panel.errorbar(row[key], row["mean"], yerr=error, fmt="o", color=plots.MODEL_COLOURS["searched"])
            panel.annotate(f"{row['lambda']:g}", (row[key], row["mean"]), xytext=(4, 4), textcoords="offset points")
        panel.set_xlabel(label)
        panel.locator_params(axis="x", nbins=4)
        panel.margins(0.25)
    points = [(row["n_parameters"], row["mean"]) for row in front(rows, objective)]
    figure.axes[0].step(*zip(*points, strict=True), where="post", color=plots.FAINT, zorder=0)
    figure.axes[0].set_ylabel(f"test {objective.name} (lambda beside each)")
    plots.save(figure, path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--lambdas", default="0.0003,0.001,0.003,0.01")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override, JSON value")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    given = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for strength in map(float, options.lambdas.split(",")):
        rows.append(one(options.recipe, strength, options.out, given))
        print(json.dumps({k: v for k, v in rows[-1].items() if k != "genotype"}), flush=True)
    (options.out / "lambda.json").write_text(json.dumps(rows, indent=1) + "\n")
    done = [row for row in rows if row.get("mean") is not None]
    if done:
        objective = lmnas.core.registry.create("task", load_recipe(options.recipe, given).task).objective
        draw(done, objective, options.out / "lambda.png")


if __name__ == "__main__":
    main()

"""Cost of a search: the search stage of several recipes, one seed and one thread each, one after the other.

CPU seconds of this process, which other programs disturb least, and their ratio to the first recipe's.

    python benchmarks/search_cost.py ptb-bayesnas-small ptb-darts-first-small ptb-enas-small --out runs/cost
"""

import argparse
import json
import time
from pathlib import Path

from lmnas.runs.directory import Run
from lmnas.runs.experiment import Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe

ALONE = {"search.seeds": 1, "execution.workers": 1, "execution.threads": 1, "execution.device": "cpu", "baselines": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override, JSON value")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs, new")
    options = parser.parse_args()
    given = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    options.out.mkdir(parents=True)
    first = 0.0
    for name in options.recipes:
        recipe = load_recipe(name, {**ALONE, **given})
        with Run(options.out / recipe.name, recipe) as run, Display(quiet=True) as display:
            experiment = Experiment(run, display)
            began = time.process_time()
            results = experiment.run_stages(("search",))
            seconds = time.process_time() - began
        first = first or seconds
        row = {"recipe": name, "cpu_seconds": round(seconds, 1), "ratio": round(seconds / first, 2)}
        row |= {"candidates": len(results["candidates"]), "kernel": results["environment"]["kernel"]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

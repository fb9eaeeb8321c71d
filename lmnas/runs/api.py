"""The same job from Python: `lmnas.search(...)` gives a `FinishedRun`, `lmnas.load(path)` opens one again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmnas.core.contracts import Model, Task
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.runs.build import load_model, open_device, open_task
from lmnas.runs.directory import Run
from lmnas.runs.experiment import Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import Recipe, load_recipe
from lmnas.runs.start import start


@dataclass(frozen=True)
class TrainedModel:
    """A trained model with the task it belongs to."""

    module: Model
    genotype: Genotype
    task: Task

    def score(self, text: str) -> float:
        """The task's metric on new text (perplexity per word), the first token given.

        Raises:
            UserError: fewer than two tokens.
        """
        return self.task.score_text(self.module, text).value


@dataclass(frozen=True)
class FinishedRun:
    """Content of a run directory."""

    path: Path
    recipe: Recipe
    results: dict[str, Any]

    @property
    def genotype(self) -> Genotype:
        """The architecture that was found.

        Raises:
            UserError: the run has not come so far.
        """
        self._refuse_unfinished("genotype.json", "genotype")
        return load_genotype(self.path / "genotype.json")

    def _refuse_unfinished(self, file: str, part: str) -> None:
        if not (self.path / file).is_file():
            raise UserError(f"run {self.path}: it has no {part} yet; start it again to continue it")

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def model(self, device: str = "cpu") -> TrainedModel:
        """The searched model of the best seed by validation.

        Raises:
            UserError: the run has not come so far, or its model cannot be read.
        """
        self._refuse_unfinished("model.json", "trained model")
        try:
            spec = json.loads((self.path / "model.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{self.path / 'model.json'}: cannot be read ({error}); `lmnas train {self.path}` writes it anew"
            raise UserError(message) from None
        task = open_task(self.recipe)
        module = load_model(self.recipe, task, spec, self.path / "model.safetensors")
        return TrainedModel(module.to(open_device(device)), Genotype.from_dict(spec["genotype"]), task)


def search(
    recipe: str | Mapping[str, Any],
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> FinishedRun:
    """Search, select, train, test and report; called again with the same arguments it continues where it stopped.

    Args:
        recipe: a shipped name, a YAML file's path, or a recipe as a mapping.
        run: the run directory; default `runs/<recipe's name>`.
        data: overrides the recipe's `task.data`.
        overrides: dotted name -> value.
        quiet: no progress on standard error.

    Raises:
        UserError: anything wrong with the arguments, in one line.
    """
    given = dict(overrides or {})
    if data is not None:
        given["task.data"] = str(data)
    checked = load_recipe(recipe, given)
    path = Path(run) if run is not None else Path("runs") / checked.name
    started = start(checked, path)
    with Run(path, checked) as opened, Display(quiet) as display:
        results = Experiment(opened, display, started).run_stages()
    return FinishedRun(path, checked, results)


def load(run: str | Path) -> FinishedRun:
    """Open the run directory of an earlier search."""
    with Run(Path(run)) as opened:
        return FinishedRun(opened.path, opened.recipe, opened.results())

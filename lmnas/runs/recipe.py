"""Recipes: complete YAML files, read into checked dataclasses.

`lmnas search NAME_OR_PATH --train.training.epochs 5 --strategy random`: dotted names override single values; a
component may be given by its name alone.
"""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from lmnas.core import registry
from lmnas.core.capabilities import refuse_unfit
from lmnas.core.errors import UserError, nearest
from lmnas.core.settings import STRICT, checked, settings_model
from lmnas.nn.kernel_table import CHOICES
from lmnas.nn.training.settings import Training

RECIPES = Path(__file__).parent / "recipes"
SECTIONS = ("task", "space", "strategy", "estimator")
"""Parts of a recipe that name a component of the registry: `{name: ..., settings...}`."""

Positive = Annotated[int, Field(ge=1)]


@dataclass(kw_only=True)
class Search:
    """Settings of the search stage: propose and score."""

    __pydantic_config__ = STRICT

    seeds: Positive = 1
    """Number of independent searches, each with its own seed."""
    candidates: Positive = 1
    """Number of proposals scored in each search."""
    batch: Positive = 1
    """Number of proposals asked for at once; those of one batch may run in parallel."""


@dataclass(kw_only=True)
class Select:
    """Settings of the selection stage: retrain the best few shortly and keep the best by validation."""

    __pydantic_config__ = STRICT

    keep: Positive = 4
    """Number of candidates of each search that are retrained."""
    epochs: Positive = 1
    """Number of passes over the training split of each short training."""
    seeds: Positive = 1
    """Number of short trainings of each candidate, each with its own seed."""


@dataclass(kw_only=True)
class Train:
    """Settings of the final stage: train the winner and the baselines from scratch."""

    __pydantic_config__ = STRICT

    training: Training
    seeds: Positive = 3
    """Number of trainings of each model, each with its own seed."""


@dataclass(kw_only=True)
class Baseline:
    """A model to compare with, trained by the same code."""

    __pydantic_config__ = STRICT

    source: str
    """A genotype's name or file; or `random`: the best of as many random candidates as the search sent to selection."""
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of the task's model that differ from those of the searched one."""
    match_parameters: bool = True
    """Choose the width that comes nearest to the searched model's number of parameters."""


@dataclass(kw_only=True)
class Execution:
    """Device, parallelism and kernel of a run; no part of the experiment."""

    __pydantic_config__ = STRICT

    device: str = "auto"
    """`auto`: a GPU if there is one; else `cpu`, `cuda`, `cuda:1`."""
    workers: Positive = 1
    """Number of jobs that run in parallel. Results do not depend on it."""
    executor: str | None = None
    """Name of a registered executor; null: this process, or several on this machine for several workers."""
    kernel: str = "auto"
    """Kernel of the recurrent cell: plain PyTorch (`reference`); compiled C++ on a CPU (`fused`, needs a compiler; 15 s
    once); whole segments with a backward pass by hand, as CUDA graphs on a GPU (`segment`). `auto` decides when a run
    begins, and the run keeps it."""
    threads: Positive | None = None
    """Number of CPU threads of each job; null: the machine's cores shared among the workers, at most four."""


@dataclass(kw_only=True)
class Recipe:
    """One complete experiment."""

    __pydantic_config__ = STRICT

    name: str
    description: str = ""
    """One line for the list of recipes."""
    task: dict[str, Any]
    space: dict[str, Any]
    strategy: dict[str, Any]
    estimator: dict[str, Any]
    train: Train
    search: Search = field(default_factory=Search)
    select: Select = field(default_factory=Select)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    execution: Execution = field(default_factory=Execution)
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed from which all random generators derive."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Significance level of the verdict's tests; its intervals cover 1 - level."""
    genotype: str | None = None
    """Genotype (name or file) to train instead of searching for one; null: search."""


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(name_or_path: str) -> Path:
    """The file of a shipped recipe's name, or a path.

    Raises:
        UserError: neither; offers the nearest name.
    """
    if name_or_path in recipe_names() and not Path(name_or_path).is_file():
        return RECIPES / f"{name_or_path}.yaml"
    with contextlib.suppress(OSError):  # a name too long for a path
        if Path(name_or_path).is_file():
            return Path(name_or_path)
    raise UserError(
        f"recipe {name_or_path!r}: neither a file nor a shipped recipe. " + nearest(name_or_path, recipe_names())
    )


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(document, dict):
        raise UserError(f"recipe {path}: expected a mapping of sections, got {type(document).__name__}")
    return document


def override(document: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value by its dotted name, in place. A component's name alone keeps no settings of another component.

    Raises:
        UserError: the place is not a mapping.
    """
    *parents, last = dotted.split(".")
    if not all((*parents, last)):
        raise UserError(f"override {dotted!r}: expected a dotted name such as train.seeds")
    place = document
    for depth, key in enumerate(parents):
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise UserError(f"{dotted}: {'.'.join(parents[: depth + 1])} is a value, it has no setting {last!r}")
    if not parents and last in SECTIONS and isinstance(value, str):
        current = place.get(last)
        current = current if isinstance(current, dict) else {}
        value = current if current.get("name") == value else {"name": value, **_kept(last, value, current)}
    elif dotted in {f"{section}.name" for section in SECTIONS} and place.get("name") != value:
        kept = _kept(parents[0], value, place)
        place.clear()
        place.update(kept)
    place[last] = value


def _kept(section: str, name: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a new component keeps of the one before: those of training, if it trains models."""
    takes = registry.setting_names(section, name)
    return {key: settings[key] for key in ("training",) if key in settings and key in takes}


def load_recipe(name_or_path: str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe from a shipped name, a YAML file or a mapping, with dotted overrides.

    Raises:
        UserError: anything that cannot be right, with its dotted place.
    """
    if isinstance(name_or_path, Mapping):
        document = copy.deepcopy(dict(name_or_path))
    else:
        path = recipe_path(name_or_path)
        document = read_yaml(path)
        document.setdefault("name", path.stem)
    # components first: a setting of the new component must not be dropped with those of the old one
    for dotted, value in sorted(
        (overrides or {}).items(), key=lambda item: item[0].removesuffix(".name") not in SECTIONS
    ):
        override(document, dotted, value)
    recipe = Recipe(**checked(settings_model(Recipe), document, ""))
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Check that components exist and that their settings are valid and fit together.

    Raises:
        UserError
    """
    _check_name(recipe.name, "name")
    if recipe.execution.kernel not in CHOICES:
        given = recipe.execution.kernel
        raise UserError(f"execution.kernel: {given!r} is unknown. {nearest(given, CHOICES)}")
    for section in SECTIONS:
        value = getattr(recipe, section)
        if "name" not in value:
            raise UserError(f"{section}: 'name' is missing. Known: {', '.join(registry.names(section))}.")
        registry.known(section, value["name"])
    for section in SECTIONS:
        registry.refuse_unknown_settings(section, getattr(recipe, section), section)
    for section in SECTIONS:
        registry.settings_of(section, getattr(recipe, section), section)
    if recipe.execution.executor is not None:
        registry.component("executor", recipe.execution.executor)
    task = registry.component("task", recipe.task["name"])
    _check_parts(recipe)
    for where, training in trainings(recipe):
        training.model_settings(task, f"{where}.model")
        training.batch_settings(task, f"{where}.batches")
    for name, baseline in recipe.baselines.items():
        _check_name(name, "baselines")
        settings = {**recipe.train.training.model, **baseline.model}
        checked(settings_model(task.model_settings), settings, f"baselines.{name}.model")
        if name == "searched":
            raise UserError("baselines.searched: this name belongs to the searched model; choose another")
        if baseline.match_parameters and "width" in baseline.model:
            raise UserError(
                f"baselines.{name}.model.width {baseline.model['width']}: match_parameters chooses the width; "
                f"leave one of them out (baselines.{name}.match_parameters: false)"
            )
    if recipe.train.training.epochs and recipe.select.epochs > recipe.train.training.epochs:
        raise UserError(
            f"select.epochs {recipe.select.epochs}: longer than the final training "
            f"(train.training.epochs {recipe.train.training.epochs}); selection is meant to be the shorter one"
        )


def _check_parts(recipe: Recipe) -> None:
    """Refuse components that do not fit together. A genotype that is given needs neither strategy nor estimator."""
    # imports torch, which a recipe that is refused before need not wait for
    from lmnas.core.contracts import SharingStrategy, refuse_unrelaxed

    chosen = {section: getattr(recipe, section)["name"] for section in SECTIONS}
    task, space, strategy, estimator = (registry.component(section, chosen[section]) for section in SECTIONS)
    lacking = strategy.needs - estimator.provides
    if lacking:
        able = [
            name
            for name in registry.names("estimator")
            if strategy.needs <= registry.component("estimator", name).provides
        ]
        raise UserError(
            f"strategy {chosen['strategy']!r} needs {' and '.join(sorted(lacking))}, which estimator "
            f"{chosen['estimator']!r} does not provide. Estimators that do: {', '.join(able) or 'none'}."
        )
    if "shared-weights" in estimator.provides and not issubclass(strategy, SharingStrategy):
        able = [
            name
            for name in registry.names("strategy")
            if issubclass(registry.component("strategy", name), SharingStrategy)
        ]
        raise UserError(
            f"estimator {chosen['estimator']!r} trains shared weights on the strategy's choices, and strategy "
            f"{chosen['strategy']!r} makes none. Strategies that do: {', '.join(able)}."
        )
    searching = {"estimator": estimator, "strategy": strategy}
    for section, part in {"task": task, **({} if recipe.genotype else searching)}.items():
        refuse_unfit(f"{section} {chosen[section]!r}", part.takes, chosen["space"], space.makes)
    if recipe.genotype is None and "mixture" in strategy.needs:
        refuse_unrelaxed(space, f"strategy {chosen['strategy']!r}")
    if recipe.genotype is None and "shared-weights" in estimator.provides:
        refuse_unrelaxed(space, f"estimator {chosen['estimator']!r}")


def _check_name(name: str, where: str) -> None:
    """Names become parts of file names."""
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise UserError(f"{where}: expected a name that can be part of a file name, got {name!r}")


def trainings(recipe: Recipe) -> list[tuple[str, Training]]:
    """(place, training) of every training in a recipe."""
    found = [("train.training", recipe.train.training)]
    settings = registry.settings_of("estimator", recipe.estimator, "estimator")
    if isinstance(settings.get("training"), Training):
        found.append(("estimator.training", settings["training"]))
    return found


def as_document(value: Any) -> Any:
    """A recipe as plain data, defaults included."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_document(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: as_document(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_document(item) for item in value]
    return value


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe with every default filled in, components' settings included."""
    document = as_document(recipe)
    for section in SECTIONS:
        value = getattr(recipe, section)
        settings = registry.settings_of(section, value, section)
        document[section] = {"name": value["name"], **as_document(settings)}
    return document


def differences(first: Any, second: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted place, first, second) wherever two documents differ, a component's name before its settings."""
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            difference
            for key in sorted({*first, *second}, key=lambda key: (key != "name", key))
            for difference in differences(first.get(key), second.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if first == second else [(where, first, second)]

"""Names of spaces, strategies, estimators and tasks, and where each is found.

A newcomer is one file and one line in `COMPONENTS`. Components are plain classes: positional arguments come from the
run, keyword-only arguments are the settings a recipe may give (`lmnas.core.settings`).
"""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmnas.core.capabilities import check_words
from lmnas.core.errors import UserError, nearest
from lmnas.core.settings import checked, settings_model, unknown_setting

COMPONENTS: dict[str, dict[str, str]] = {
    "space": {
        "recurrent-cell": "lmnas.spaces.recurrent.cell:RecurrentCell",
        "recurrent-sparse": "lmnas.spaces.recurrent.sparse:RecurrentSparse",
        "lstm": "lmnas.spaces.recurrent.layers:LSTM",
        "resnet": "lmnas.spaces.conv.resnet:ResNet",
        "recurrent-layers": "lmnas.spaces.recurrent.layers:RecurrentLayers",
        "flexibert": "lmnas.spaces.transformer.flexibert:FlexiBERT",
        "recurrent-graph": "lmnas.spaces.recurrent.graph:RecurrentGraph",
        "enas-macro": "lmnas.spaces.conv.macro:ConvMacro",
        "darts-conv": "lmnas.spaces.conv.cells:DartsConv",
        "enas-micro": "lmnas.spaces.conv.cells:EnasMicro",
    },
    "strategy": {
        "random": "lmnas.methods.strategies.random_search:RandomSearch",
        "reinforce": "lmnas.methods.strategies.reinforce:Reinforce",
        "gradient": "lmnas.methods.strategies.gradient:Gradient",
        "bayes": "lmnas.methods.strategies.bayes:Bayes",
    },
    "estimator": {
        "shared": "lmnas.methods.estimators.shared:Shared",
        "hidden-covariance": "lmnas.methods.estimators.proxies:HiddenCovariance",
        "proxy": "lmnas.methods.estimators.proxies:Proxy",
        "standalone": "lmnas.methods.estimators.standalone:Standalone",
        "table": "lmnas.methods.estimators.table:Table",
    },
    "metric": {
        "recurrent": "lmnas.methods.proxies.recurrent:RecurrentMetrics",
        "recurrent-predictor": "lmnas.methods.proxies.predictor:PredictorMetrics",
        "transformer": "lmnas.methods.proxies.transformer:TransformerMetrics",
    },
    "task": {
        "language-modeling": "lmnas.tasks.language_modeling:LanguageModeling",
        "image-classification": "lmnas.tasks.image_classification:ImageClassification",
    },
    "panel": {  # of a detail of a score or a statistic of a search, under its name: `module:function`
        "confusion": "lmnas.report.panels.classification:confusion",
        "calibration": "lmnas.report.panels.classification:calibration",
        "updates": "lmnas.report.panels.pruning:updates",
    },
    "executor": {
        "inline": "lmnas.runs.executors.inline:Inline",
        "processes": "lmnas.runs.executors.processes:Processes",
    },
    "job": {
        "prepare": "lmnas.runs.job_kinds.prepare:Prepare",
        "estimate": "lmnas.runs.job_kinds.estimate:Estimate",
        "fit": "lmnas.runs.job_kinds.fit:Fit",
        "test": "lmnas.runs.job_kinds.test:Test",
        "compress": "lmnas.runs.job_kinds.compress:Compress",
        "finetune": "lmnas.runs.job_kinds.finetune:Finetune",
    },
    "optimizer": {
        "sgd": "lmnas.nn.training.optimizers:SGD",
        "adam": "lmnas.nn.training.optimizers:Adam",
        "adamw": "lmnas.nn.training.optimizers:AdamW",
        "adafactor": "lmnas.nn.training.optimizers:Adafactor",
        "muon": "lmnas.nn.training.optimizers:Muon",
    },
    "schedule": {
        "constant": "lmnas.nn.training.schedules:Constant",
        "step-decay": "lmnas.nn.training.schedules:StepDecay",
        "cosine": "lmnas.nn.training.schedules:Cosine",
        "inverse-root": "lmnas.nn.training.schedules:InverseRoot",
        "warmup-stable-decay": "lmnas.nn.training.schedules:WarmupStableDecay",
    },
}


WORDS_OF = {"space": "makes", "task": "takes", "strategy": "takes", "estimator": "takes", "metric": "takes"}
"""Kind of component -> the attribute that holds its capabilities."""
ENVIRONMENT = "LMNAS_COMPONENTS"
"""Components of other packages, `kind:name=module:Class` separated by commas. Worker processes inherit it."""


def register(kind: str, name: str, target: str) -> None:
    """Add a component: `target` is `module:Class`. The one line a newcomer outside this package writes.

    Raises:
        ValueError: unknown kind, or not `module:Class`.
    """
    if kind not in COMPONENTS:
        raise ValueError(f"kind {kind!r} is unknown. " + nearest(kind, COMPONENTS))
    if not all(target.partition(":")):
        raise ValueError(f"{kind} {name!r}: expected a target like 'module:Class', got {target!r}")
    if COMPONENTS[kind].get(name) == target:
        return
    COMPONENTS[kind][name] = target
    os.environ[ENVIRONMENT] = ",".join(filter(None, [os.environ.get(ENVIRONMENT), f"{kind}:{name}={target}"]))


def _read_environment() -> None:
    for entry in filter(None, os.environ.get(ENVIRONMENT, "").split(",")):
        names, _, target = entry.partition("=")
        kind, _, name = names.partition(":")
        if kind in COMPONENTS and name and all(target.partition(":")):
            COMPONENTS[kind][name] = target
        else:
            raise UserError(f"{ENVIRONMENT}: expected kind:name=module:Class, got {entry!r}")


def names(kind: str) -> list[str]:
    _read_environment()
    return sorted(COMPONENTS[kind])


def known(kind: str, name: object) -> str:
    """`name`, which need not be imported to be known.

    Raises:
        UserError: it is not; offers the nearest.
    """
    _read_environment()
    if not isinstance(name, str) or name not in COMPONENTS[kind]:
        raise UserError(f"{kind} {name!r} is unknown. " + nearest(name, COMPONENTS[kind]))
    return name


def summary(kind: str, name: str) -> str:
    """First line of a component's docstring, read from its source: importing it may take seconds.

    Raises:
        UserError: it cannot be imported.
    """
    source = _source(kind, name)
    # else made by a function, or of a base class
    text = (source and ast.get_docstring(source)) or inspect.getdoc(component(kind, name)) or ""
    return text.strip().partition("\n")[0]


def setting_names(kind: str, name: str) -> list[str]:
    """The settings that a component takes, in order, read from its source where that says it.

    Raises:
        UserError: it cannot be imported.
    """
    source = _source(kind, name)
    methods = [node for node in source.body if isinstance(node, ast.FunctionDef)] if source else []
    # a decorator or a __new__ may take others than __init__ says
    if source and not source.decorator_list and not any(node.name == "__new__" for node in methods):
        for node in methods:
            if node.name == "__init__" and not node.decorator_list:
                return [argument.arg for argument in node.args.kwonlyargs]
    return list(settings_model(component(kind, name)).model_fields)


def _source(kind: str, name: str) -> ast.ClassDef | None:
    """The class registered as `name`, parsed and not imported; None: its module does not define it as a class."""
    module, _, attribute = COMPONENTS[kind][known(kind, name)].partition(":")
    with contextlib.suppress(ImportError, OSError, SyntaxError, ValueError):
        found = importlib.util.find_spec(module)
        tree = ast.parse(Path(found.origin if found and found.origin else "").read_text(encoding="utf-8"))
        return next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == attribute), None)
    return None


def component(kind: str, name: object) -> Any:
    """The class registered as `name`.

    Raises:
        UserError: unknown name (offers the nearest), or another package's component that cannot be imported.
    """
    name = known(kind, name)
    module, _, attribute = COMPONENTS[kind][name].partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if module.startswith("lmnas."):
            raise
        raise UserError(f"{kind} {name!r}: {module}:{attribute} cannot be imported ({error})") from error
    if kind in WORDS_OF:
        attribute = WORDS_OF[kind]
        words = getattr(found, attribute, None)  # of another package, maybe of no class of ours
        if words is None:
            raise UserError(f"{kind} {name!r}: {COMPONENTS[kind][name]} states no {attribute!r}")
        check_words(words, f"{kind} {name!r}")
    return found


def refuse_unknown_settings(kind: str, section: Mapping[str, Any], where: str) -> None:
    """Refuse a setting that the component of `section` does not take, without importing it.

    Raises:
        UserError: names the nearest that it takes.
    """
    names = setting_names(kind, section["name"])
    for key in section:
        if key != "name" and key not in names:
            raise UserError(unknown_setting(f"{where}.{key}", key, names))


def settings_of(kind: str, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The checked settings of the component that `section` names (`{"name": ..., **settings}`)."""
    target = component(kind, section.get("name"))
    return checked(settings_model(target), {k: v for k, v in section.items() if k != "name"}, where)


def create(kind: str, section: Mapping[str, Any], *collaborators: Any) -> Any:
    """The component that `section` names, built from the run's collaborators and the recipe's settings."""
    return component(kind, section.get("name"))(*collaborators, **settings_of(kind, section, kind))

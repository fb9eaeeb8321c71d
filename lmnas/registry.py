"""Names of spaces, strategies, estimators and tasks, and how settings reach them.

A newcomer is one file and one line in `COMPONENTS`. Components are plain classes: positional arguments come from the
run, keyword-only arguments are the settings a recipe may give, and their types are checked.
"""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from lmnas.errors import UserError, nearest

COMPONENTS: dict[str, dict[str, str]] = {
    "space": {
        "recurrent-cell": "lmnas.spaces.recurrent_cell:RecurrentCell",
        "lstm": "lmnas.spaces.lstm:LSTM",
    },
    "strategy": {
        "random": "lmnas.strategies.random_search:RandomSearch",
        "reinforce": "lmnas.strategies.reinforce:Reinforce",
        "gradient": "lmnas.strategies.gradient:Gradient",
    },
    "estimator": {
        "shared": "lmnas.estimators.shared:Shared",
        "standalone": "lmnas.estimators.standalone:Standalone",
    },
    "task": {
        "language-modeling": "lmnas.tasks.language_modeling:LanguageModeling",
    },
}


def register(kind: str, name: str, target: str) -> None:
    """Add a component: `target` is `module:Class`. The one line a newcomer outside this package writes."""
    COMPONENTS[kind][name] = target


def names(kind: str) -> list[str]:
    return sorted(COMPONENTS[kind])


def component(kind: str, name: object) -> Any:
    """The class registered as `name`.

    Raises:
        UserError: unknown name; offers the nearest.
    """
    if name not in COMPONENTS[kind]:
        raise UserError(f"{kind} {name!r} is unknown. " + nearest(name, COMPONENTS[kind]))
    module, _, attribute = COMPONENTS[kind][str(name)].partition(":")
    return getattr(importlib.import_module(module), attribute)


STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False, protected_namespaces=())


def settings_model(target: type) -> type[BaseModel]:
    """A validating model of the settings of `target`: its keyword-only parameters, or its fields if a dataclass."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[parameter.name] = (parameter.annotation, default)
    return create_model(target.__name__, __config__=STRICT, **fields)


def checked(model: type[BaseModel], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`settings` with types checked and defaults filled in.

    Raises:
        UserError: unknown key, wrong type or out of range; `where` is the dotted place in the recipe.
    """
    try:
        value = model.model_validate(dict(settings))
    except ValidationError as error:
        raise UserError(explain(error, model, where)) from None
    return {name: getattr(value, name) for name in model.model_fields}


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """The first problem of a validation error as one line."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    if first["type"] == "extra_forbidden":
        owner = _fields_at(model, first["loc"][:-1])
        return f"{path}: unknown setting. " + nearest(first["loc"][-1], owner)
    if first["type"] == "missing":
        return f"{path}: missing, it has no default"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]}, got {first['input']!r}"


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    owner: Any = model
    for part in location:
        field = getattr(owner, "model_fields", {}).get(part)
        if field is None:
            continue
        owner = field.annotation
    return list(getattr(owner, "model_fields", {}) or getattr(owner, "__dataclass_fields__", {}))


def settings_of(kind: str, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The checked settings of the component that `section` names (`{"name": ..., **settings}`)."""
    target = component(kind, section.get("name"))
    return checked(settings_model(target), {k: v for k, v in section.items() if k != "name"}, where)


def create(kind: str, section: Mapping[str, Any], *collaborators: Any) -> Any:
    """The component that `section` names, built from the run's collaborators and the recipe's settings."""
    return component(kind, section.get("name"))(*collaborators, **settings_of(kind, section, kind))

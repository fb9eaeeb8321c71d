"""Settings of components and recipes: their models, and the one line that refuses what cannot be right."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from lmnas.core.errors import UserError, nearest

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
    taken = {name: getattr(value, name) for name in model.model_fields}
    _refuse_conversion(settings, taken, where)
    return taken


def _refuse_conversion(given: Any, taken: Any, where: str) -> None:
    """Refuse `true` for a number and a number for `true`: pydantic takes both, and YAML 1.1 reads `yes` as `true`."""
    if isinstance(given, Mapping):
        for name, item in given.items():
            inner = taken.get(name) if isinstance(taken, Mapping) else getattr(taken, str(name), None)
            _refuse_conversion(item, inner, f"{where}.{name}" if where else str(name))
    elif isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        raise UserError(f"{where}: expected a number, got {given!r}")
    elif isinstance(taken, bool) and not isinstance(given, bool):
        raise UserError(f"{where}: expected true or false, got {given!r}")


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """The first problem of a validation error as one line."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in (where, *first["loc"]) if part != "")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        return unknown_setting(path, first["loc"][-1], _fields_at(model, first["loc"][:-1]))
    if first["type"] == "missing":
        return f"{path}: missing, it has no default"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("dict_type", "dataclass_type"):
        message = "expected a mapping of settings"
    given = repr(first["input"])
    shown = given if len(given) <= 80 else f"{given[:77]}..."
    return f"{path}: {message[0].lower()}{message[1:]}, got {shown}"


def unknown_setting(where: str, name: object, known: Collection[str]) -> str:
    """The line that refuses the setting `name` at the place `where`."""
    return f"{where}: unknown setting. " + nearest(name, known)


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The settings known at a place: of a nested dataclass, or of the items of a mapping."""
    owner: Any = model
    for part in location:
        owner = _fields(owner).get(part, (get_args(owner) or (None,))[-1])
    return list(_fields(owner))


def _fields(owner: Any) -> dict[str, Any]:
    """Name -> type of the fields of a model or dataclass; empty for anything else."""
    if isinstance(owner, type) and is_dataclass(owner):
        return {field.name: field.type for field in fields(owner)}
    return {name: field.annotation for name, field in getattr(owner, "model_fields", {}).items()}

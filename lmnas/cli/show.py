"""Draw and describe a genotype."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmnas.core import registry
from lmnas.core.capabilities import lacking
from lmnas.core.contracts import Body, Diagram, Model, Space, Task, UsualModel
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_document
from lmnas.nn.train import n_parameters
from lmnas.report.diagram import draw
from lmnas.runs.build import covering_space


def describe(name: str, width: int | None, vocabulary: int | None, out: Path) -> tuple[dict[str, Any], str]:
    """Pictures of a genotype in `out` (SVG and PNG), and its description as JSON values and as text.

    `n_parameters` counts the usual model of the task that takes its bodies (`Task.usual_model`), of `width` and
    `vocabulary` where they are given, else as the genotype's file says (`width`, `decoder_bias`); None where no task
    does.
    """
    for option, value in (("--width", width), ("--vocabulary", vocabulary)):
        if value is not None and value < 1:
            raise UserError(f"{option}: expected at least 1, got {value}")
    document = load_document(name)
    genotype = Genotype.from_dict(document, name)
    space = covering_space(genotype)
    asked = {key: value for key, value in (("width", width), ("vocabulary", vocabulary)) if value is not None}
    usual = usual_model(space, name, {**_stated(document, name), **asked})
    body, model = _build(space, genotype, usual)
    stem = Path(name).stem
    pictures = _draw(space.diagram(genotype), out, stem)
    in_body, in_model = n_parameters(body), None if model is None else n_parameters(model)
    result = {
        "genotype_id": genotype.id,
        **genotype.to_dict(),
        "source": document.get("source"),
        "width": usual.width,
        "vocabulary": usual.vocabulary,
        "decoder_bias": usual.decoder_bias,
        "n_parameters": in_model,
        "n_parameters_body": in_body,
        "pictures": {kind: str(path) for kind, path in pictures.items()},
    }
    lines = [
        f"{document.get('name', stem)}: genotype {genotype.id} of space {genotype.space}",
        *([f"source: {document['source']}"] if document.get("source") else []),
        *(f"  {name} = {value}" for name, value in genotype.choices.items()),
        f"parameters: {usual.words.format(model=in_model, body=in_body)}",
        f"pictures: {pictures['svg']}, {pictures['png']}",
    ]
    return result, "\n".join(lines)


def _stated(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The sizes of a model that a genotype's file states."""
    stated = {key: document[key] for key in ("width", "decoder_bias") if key in document}
    width, bias = stated.get("width", 1), stated.get("decoder_bias", True)
    if type(width) is not int or width < 1:
        raise UserError(f"genotype {name}: width: expected a whole number from 1, got {width!r}")
    if not isinstance(bias, bool):
        raise UserError(f"genotype {name}: decoder_bias: expected true or false, got {bias!r}")
    return stated


def usual_model(space: Space, name: str, given: Mapping[str, Any]) -> UsualModel:
    """The usual model of the first task that has one around bodies of `space`; without one, the sizes of a body."""
    tasks: list[type[Task]] = [registry.component("task", task) for task in registry.names("task")]
    usual = [task.usual_model(name, given) for task in tasks if not lacking(task.takes, space.makes)]
    return next((model for model in usual if model.build), Task.usual_model(name, given))


def _build(space: Space, genotype: Genotype, usual: UsualModel) -> tuple[Body, Model | None]:
    """The body, and the model around it if there is one; nothing is allocated.

    Raises:
        UserError: torch cannot count that many weights.
    """
    try:
        with torch.device("meta"):
            body = space.build(genotype, usual.width)
            return body, usual.build(body) if usual.build else None
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():  # torch counts bytes in 64 bits
            raise
    sizes = {"width": usual.width, "vocabulary": usual.vocabulary}
    given = " ".join(f"--{option} {size}" for option, size in sizes.items() if size is not None)
    raise UserError(f"{given}: no machine holds a model that large")


def _draw(diagram: Diagram, out: Path, stem: str) -> dict[str, Path]:
    """Format -> path of the pictures written.

    Raises:
        UserError: `out` cannot be written to.
    """
    pictures = {"svg": out / f"{stem}.svg", "png": out / f"{stem}.png"}
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw(diagram, pictures["svg"], "svg")
        draw(diagram, pictures["png"], "png")
    except OSError as error:
        raise UserError(f"--out {out}: pictures cannot be written ({error.strerror})") from None
    return pictures

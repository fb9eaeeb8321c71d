"""Draw and describe a genotype."""

from pathlib import Path
from typing import Any

import torch

from lmnas.core.capabilities import lacking
from lmnas.core.contracts import Diagram, ImageBody, Model
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_document
from lmnas.nn.train import n_parameters
from lmnas.report.diagram import draw
from lmnas.runs.build import covering_space
from lmnas.tasks import image_classification
from lmnas.tasks.image_classification import ImageClassification, ImageClassifier
from lmnas.tasks.language_modeling import LanguageModel, LanguageModeling, ModelSettings

DEFAULT_WIDTH, DEFAULT_VOCABULARY = 850, 10_000
"""The papers' Penn Treebank language model."""
DEFAULT_CHANNELS, CLASSES = 36, 10
"""DARTS's network for CIFAR-10."""


def describe(name: str, width: int | None, vocabulary: int | None, out: Path) -> tuple[dict[str, Any], str]:
    """Pictures of a genotype in `out` (SVG and PNG), and its description as JSON values and as text.

    `n_parameters` counts a tied language model of `width` and `vocabulary`, with an output bias per word unless the
    genotype's source counts without one (`decoder_bias` in its file); for bodies of images a classifier of ten classes
    that starts from `width` channels; None where the body makes neither.
    """
    given, vocabulary_given = width, vocabulary
    vocabulary = DEFAULT_VOCABULARY if vocabulary is None else vocabulary
    for option, value in (("--width", given), ("--vocabulary", vocabulary)):
        if value is not None and value < 1:
            raise UserError(f"{option}: expected at least 1, got {value}")
    document = load_document(name)
    genotype = Genotype.from_dict(document, name)
    space = covering_space(genotype)
    of_images = not lacking(ImageClassification.takes, space.makes)
    if of_images and vocabulary_given is not None:
        raise UserError(f"--vocabulary: genotype {name} is a network for images")
    usual = document.get("width", DEFAULT_CHANNELS if of_images else DEFAULT_WIDTH)
    width = usual if given is None else given
    if type(width) is not int or width < 1:
        raise UserError(f"genotype {name}: width: expected a whole number from 1, got {width!r}")
    bias = document.get("decoder_bias", True)
    if not isinstance(bias, bool):
        raise UserError(f"genotype {name}: decoder_bias: expected true or false, got {bias!r}")
    try:
        with torch.device("meta"):
            body = space.build(genotype, width)
            model: Model | None = None
            if isinstance(body, ImageBody):
                model = ImageClassifier(body, CLASSES, image_classification.ModelSettings(width=width))
            if not lacking(LanguageModeling.takes, space.makes):
                model = LanguageModel(body, vocabulary, ModelSettings(width=width, decoder_bias=bias))
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():  # torch counts bytes in 64 bits
            raise
        raise UserError(f"--width {width} --vocabulary {vocabulary}: no machine holds a model that large") from None
    stem = Path(name).stem
    pictures = _draw(space.diagram(genotype), out, stem)
    result = {
        "genotype_id": genotype.id,
        **genotype.to_dict(),
        "source": document.get("source"),
        "width": width,
        "vocabulary": None if of_images else vocabulary,
        "decoder_bias": None if of_images else bias,
        "n_parameters": None if model is None else n_parameters(model),
        "n_parameters_body": n_parameters(body),
        "pictures": {kind: str(path) for kind, path in pictures.items()},
    }
    lines = [
        f"{document.get('name', stem)}: genotype {genotype.id} of space {genotype.space}",
        *([f"source: {document['source']}"] if document.get("source") else []),
        *(f"  {name} = {value}" for name, value in genotype.choices.items()),
        f"parameters: {_counted(result, of_images)}",
        f"pictures: {pictures['svg']}, {pictures['png']}",
    ]
    return result, "\n".join(lines)


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


def _counted(result: dict[str, Any], of_images: bool) -> str:
    """Numbers of parameters in words."""
    width, bias = result["width"], result["decoder_bias"]
    counted = f"{result['n_parameters_body']:,} in the body, for embeddings of width {width}"
    if of_images:
        counted = (
            f"{result['n_parameters']:,} as a classifier of {width} channels at first and {CLASSES} classes, "
            f"{result['n_parameters_body']:,} in the body"
        )
    elif result["n_parameters"] is not None:
        counted = (
            f"{result['n_parameters']:,} as a language model of width {width} and {result['vocabulary']:,} words "
            f"({'with' if bias else 'without'} an output bias), {result['n_parameters_body']:,} in the cell"
        )
    return counted

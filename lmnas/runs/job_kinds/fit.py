"""Fitting one stand-alone model from scratch -> model.safetensors and its validation score."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.core.length import Length
from lmnas.nn.train import fit, initialise
from lmnas.runs.build import build_model, space_for
from lmnas.runs.work import JobKind, Workplace


@dataclass(frozen=True)
class Fit(JobKind):
    """The recipe's final training for `epochs`, its model's settings changed by `model`."""

    kind: ClassVar[str] = "fit"
    genotype: dict[str, Any]
    seed: int
    epochs: int | None
    model: dict[str, Any]

    def do(self, place: Workplace, job: Job) -> Mapping[str, Any]:
        recipe, task, device = place.opened.recipe, place.opened.task, place.opened.device
        before = recipe.train.training
        training = replace(before, model={**before.model, **self.model})
        if self.epochs is not None:  # else the recipe's own length, in another unit
            training = training.lasting(Length(self.epochs))
        genotype = Genotype.from_dict(self.genotype)
        built = build_model(task, genotype, training, space=space_for(recipe, genotype))
        return fit(initialise(built, self.seed).to(device), task, training, self.seed, job, device)

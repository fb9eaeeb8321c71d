"""Compressing a trained model: units taken out (`lmnas.nn.sparsity`) -> a smaller model.safetensors, its genotype."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.nn.sparsity.training import OUTER, Sparsity, layout, sparsify
from lmnas.nn.train import n_parameters, save_weights
from lmnas.nn.training.settings import Training
from lmnas.runs.build import build_model, covering_space, load_model, space_for
from lmnas.runs.work import JobKind, Workplace

DENSE = "dense.safetensors"
"""The weights that a compression began from, in its directory."""


@dataclass(frozen=True)
class Compress(JobKind):
    """Rounds of curvature, update and training; then the smaller model, which must score as the masked one does.

    Attributes:
        dense: `genotype` and `model` of the job that fitted the dense model.
        digest: of its weights.
    """

    kind: ClassVar[str] = "compress"
    dense: dict[str, Any]
    digest: str
    seed: int
    learning_rate: float
    sparsity: dict[str, Any]

    def do(self, place: Workplace, job: Job) -> Mapping[str, Any]:
        recipe, task, device = place.opened.recipe, place.opened.task, place.opened.device
        training = at_rate(recipe.train.training, self.learning_rate)
        net = load_model(recipe, task, self.dense, place.run / DENSE).to(device)
        found = sparsify(net, task, training, Sparsity(**self.sparsity), self.seed, job, device)
        strips = layout(net)
        kept = {
            family.name: torch.zeros(family.size, dtype=torch.bool).index_fill(
                0, torch.tensor(found["kept"][family.name]), True
            )
            for family in strips.families
        }
        units = {family.name: len(found["kept"][family.name]) for family in strips.families}
        genotype, width = smaller_genotype(Genotype.from_dict(self.dense["genotype"]), units)
        model = {**self.dense["model"], "width": width}
        changed = replace(training, model={**training.model, **model})
        reduced = build_model(task, genotype, changed, space=space_for(recipe, genotype)).to(device)
        reduced.load_state_dict(strips.cut(net.state_dict(), kept))
        batches = training.batch_settings(task)
        masked, cut = (task.evaluate(m, "valid", batches) for m in (net, reduced))
        # one function twice, but for the order of its sums
        assert abs(masked.value - cut.value) <= 1e-3 * abs(masked.value), (masked.value, cut.value)
        save_weights(reduced, job)
        return {
            **found,
            "genotype": genotype.to_dict(),
            "model": model,
            "n_parameters_before": n_parameters(net),
            "n_parameters": n_parameters(reduced),
            "masked_value": masked.value,
            "value": cut.value,
            "n_predictions": cut.n_predictions,
            "split": "valid",
            "seconds": job.seconds,
        }


def at_rate(training: Training, learning_rate: float) -> Training:
    """The same training by SGD at another rate."""
    optimizer = replace(training.optimizer, method="sgd", learning_rate=learning_rate, decay=1.0)
    return replace(training, optimizer=optimizer)


def smaller_genotype(genotype: Genotype, units: Mapping[str, int]) -> tuple[Genotype, int]:
    """Genotype of the remaining units, and its width.

    Args:
        units: family of strips -> how many are kept, layer after layer.

    Raises:
        UserError: its space cannot say it.
    """
    inner = [count for name, count in units.items() if name != OUTER]
    return covering_space(genotype).without_units(genotype, units[OUTER], inner), units[OUTER]

"""Training a compressed model a little; where that does not help, it stays as it was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lmnas.core.errors import UserError
from lmnas.core.job import Job, read_result
from lmnas.core.length import Length
from lmnas.nn.train import fit, n_parameters, save_weights
from lmnas.runs.build import load_model
from lmnas.runs.job_kinds.compress import at_rate
from lmnas.runs.work import JobKind, Workplace, intact


@dataclass(frozen=True)
class Finetune(JobKind):
    """Trains the model that the job `reduced` left for `epochs`; result and files as of a fit."""

    kind: ClassVar[str] = "finetune"
    genotype: dict[str, Any]
    model: dict[str, Any]
    seed: int
    epochs: int
    learning_rate: float
    reduced: str

    def do(self, place: Workplace, job: Job) -> Mapping[str, Any]:
        recipe, task, device = place.opened.recipe, place.opened.task, place.opened.device
        directory = place.job(self.reduced)
        before = read_result(directory)
        if before is None:
            raise UserError(f"{directory}: its result is gone; delete the folder to make it anew")
        spec = {"genotype": self.genotype, "model": self.model}
        net = load_model(recipe, task, spec, intact(directory, "model.safetensors")).to(device)
        given = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        kept = {"value": before["value"], "n_predictions": before["n_predictions"], "epoch": 0, "steps": 0}
        result: dict[str, Any] = {**kept, "n_parameters": n_parameters(net), "tokens_per_second": None}
        if self.epochs:
            training = at_rate(recipe.train.training, self.learning_rate).lasting(Length(self.epochs))
            result = fit(net, task, training, self.seed, job, device)
            if not task.objective.better(result["value"], before["value"]):
                result = {**result, **kept, "steps": result["steps"]}
                net.load_state_dict(given)
        save_weights(net, job)
        return {**result, "seconds": job.seconds}

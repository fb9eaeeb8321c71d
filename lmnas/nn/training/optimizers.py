"""Optimisers: torch's own classes behind one settings class (`lmnas.nn.training.settings.Optimizer`).

A new one is a class here and a line in `lmnas.core.registry`. Gradients are clipped before decay is added, so that the
optimiser's own decay is the right one. Fused forms take one pass over the weights, a quarter of the time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from lmnas.nn.training.settings import Optimizer

Groups = list[dict[str, Any]]
"""Parameter groups as torch takes them: `params`, `lr`, `weight_decay`."""


class Method(ABC):
    """A way to update weights.

    Attributes:
        uses: settings that mean something for it, beyond those of every optimiser.
        tolerated: settings of other optimisers that it ignores, as recipes of version 0.1.0 may have them.
        copies: copies of the weights that it holds at most, without momentum.
        by_role: it treats roles of parameters differently.
        heavy_ball: an update adds momentum times a buffer to the gradient, which second-order search must know.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    tolerated: ClassVar[frozenset[str]] = frozenset()
    copies: ClassVar[int] = 0
    by_role: ClassVar[bool] = False
    heavy_ball: ClassVar[bool] = False

    @staticmethod
    def check(settings: "Optimizer") -> None:
        """Raise ValueError where settings contradict each other."""

    @staticmethod
    @abstractmethod
    def make(groups: Groups, settings: "Optimizer") -> "torch.optim.Optimizer | Joined":
        """The optimiser of parameter groups that have a rate and a decay."""


class SGD(Method):
    """Stochastic gradient descent, with or without momentum."""

    uses = frozenset({"momentum", "nesterov"})
    heavy_ball = True

    @staticmethod
    def check(settings: "Optimizer") -> None:
        if settings.nesterov and not settings.momentum:
            raise ValueError("nesterov is a form of SGD's momentum: set a momentum above 0")

    @staticmethod
    def make(groups: Groups, settings: "Optimizer") -> "torch.optim.Optimizer":
        import torch

        optimizer = torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, fused=True)
        if settings.momentum:
            # a path leaves weights without a gradient, and torch's fused step takes buffers of all or of none
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return optimizer


class Adam(Method):
    """Adam with L2 decay in the gradient (Kingma & Ba, 2015, arXiv 1412.6980)."""

    uses = frozenset({"betas", "epsilon"})
    tolerated = frozenset({"momentum"})
    copies = 2

    @staticmethod
    def make(groups: Groups, settings: "Optimizer") -> "torch.optim.Optimizer":
        from torch import optim

        return optim.Adam(groups, betas=settings.betas, eps=settings.epsilon, fused=True)


class AdamW(Adam):
    """Adam with decay apart from the gradient (Loshchilov & Hutter, 2019, arXiv 1711.05101)."""

    tolerated = frozenset()

    @staticmethod
    def make(groups: Groups, settings: "Optimizer") -> "torch.optim.Optimizer":
        from torch import optim

        return optim.AdamW(groups, betas=settings.betas, eps=settings.epsilon, fused=True)


class Adafactor(Method):
    """Adafactor: second moments by row and column (Shazeer & Stern, 2018, arXiv 1804.04235)."""

    @staticmethod
    def make(groups: Groups, settings: "Optimizer") -> "torch.optim.Optimizer":
        from torch import optim

        return optim.Adafactor(groups)


class Muon(Method):
    """Muon for matrices, AdamW for everything else (Jordan et al., 2024; Liu et al., 2025, arXiv 2502.16982).

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both.
    """

    uses = frozenset({"momentum", "nesterov", "betas", "epsilon"})
    copies, by_role = 2, True

    @staticmethod
    def check(settings: "Optimizer") -> None:
        if not settings.momentum:
            raise ValueError("optimizer 'muon' orthogonalises its momentum: set a momentum above 0, usually 0.95")

    @staticmethod
    def make(groups: Groups, settings: "Optimizer") -> "Joined":
        from torch import optim

        def pick(flat: bool) -> Groups:
            parts = [{**group, "params": [p for p in group["params"] if is_flat(group, p) == flat]} for group in groups]
            return [part for part in parts if part["params"]]

        def is_flat(group: dict[str, Any], parameter: "torch.Tensor") -> bool:
            return group["role"] == "matrix" and parameter.ndim == 2

        parts: dict[str, torch.optim.Optimizer] = {}
        if matrices := pick(True):
            momentum, nesterov = settings.momentum, settings.nesterov
            adjusted = "match_rms_adamw"
            parts["muon"] = optim.Muon(matrices, momentum=momentum, nesterov=nesterov, adjust_lr_fn=adjusted)
        if others := pick(False):
            parts["adamw"] = AdamW.make(others, settings)
        return Joined(parts)


class Joined:
    """Several optimisers of one model's weights as one."""

    def __init__(self, parts: "Mapping[str, torch.optim.Optimizer]"):
        self.parts = dict(parts)

    @property
    def param_groups(self) -> Groups:
        return [group for part in self.parts.values() for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def make_optimizer(model: Any, settings: "Optimizer") -> "torch.optim.Optimizer | Joined":
    """The optimiser of a model's weights: one group of all of them, or one for each role that has factors of its own.

    Args:
        model: a `Model`.
    """
    groups: Groups = []
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.roles.alike and not settings.part.by_role:
        return settings.part.make([{"params": list(model.parameters()), "lr": rate, "weight_decay": decay}], settings)
    roles, parameters = model.roles(), dict(model.named_parameters())
    for role, factors in settings.roles.by_role().items():
        chosen = [parameter for name, parameter in parameters.items() if roles[name] == role]
        if chosen:
            each = {"params": chosen, "lr": rate * factors.rate, "weight_decay": decay * factors.decay}
            groups.append({**each, "role": role, "factor": factors.rate})
    return settings.part.make(groups, settings)

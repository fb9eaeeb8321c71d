"""Random search, and random search with weight sharing.

Li & Talwalkar, Random Search and Reproducibility for Neural Architecture Search, 2019
(https://arxiv.org/abs/1902.07638). With shared weights, every minibatch trains a fresh uniform path (section 3.2).
"""

from typing import Any

from lmnas.core import seeds
from lmnas.core.contracts import Objective, Proposal, SharingStrategy, Space
from lmnas.core.genotype import Genotype

REDRAWS = 1000
"""Draws for one new genotype before the space counts as exhausted."""


class RandomSearch(SharingStrategy):
    """Uniform over the space's decisions.

    Args:
        distinct: propose no genotype twice. When `REDRAWS` draws bring nothing new the search has nothing more to
            propose; a few of a space's last genotypes may then be left out.

    >>> RandomSearch(space, objective, seed=0).ask(10)
    """

    def __init__(self, space: Space, objective: Objective, seed: int, *, distinct: bool = True):
        self.space, self.objective, self.seed, self.distinct = space, objective, seed, distinct
        self.n_proposed = 0
        self.proposed_ids: set[str] = set()

    def ask(self, n: int) -> list[Proposal]:
        proposals: list[Proposal] = []
        while len(proposals) < n and (genotype := self._draw()) is not None:
            proposals.append(Proposal(genotype))
            self.n_proposed += 1
            self.proposed_ids.add(genotype.id)
        return proposals

    def _draw(self) -> Genotype | None:
        rng = seeds.rng(self.seed, "proposal", self.n_proposed)
        for _ in range(REDRAWS):
            genotype = self.space.sample(rng)
            if not self.distinct or genotype.id not in self.proposed_ids:
                return genotype
        return None

    def choice(self, step: int) -> Genotype:
        """A uniform path, another for each minibatch."""
        return self.space.sample(seeds.rng(self.seed, "choice", step))

    def state_dict(self) -> dict[str, Any]:
        return {"n_proposed": self.n_proposed, "proposed_ids": sorted(self.proposed_ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_proposed = state["n_proposed"]
        self.proposed_ids = set(state["proposed_ids"])

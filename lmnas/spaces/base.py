"""What spaces have in common: proposals from stated decisions, and refusals of those without a relaxation."""

from typing import Any

from torch import nn

from lmnas.core.contracts import EdgeTable, Mixture
from lmnas.core.decisions import Decisions
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype


class Stated:
    """A space whose genotypes are the choices of its decisions."""

    name: str
    decisions: Decisions

    def sample(self, rng: Any) -> Genotype:
        return Genotype(self.name, self.decisions.sample(rng))

    def mutate(self, genotype: Genotype, rng: Any) -> Genotype:
        return Genotype(self.name, self.decisions.mutate(genotype.choices, rng))

    def check(self, genotype: Genotype) -> None:
        """Refuse what is not of this space with these settings.

        Raises:
            UserError: another space's genotype, or a decision that is missing, unknown or out of range.
        """
        if genotype.space != self.name:
            raise UserError(f"genotype {genotype.id} is of space {genotype.space!r}, expected {self.name!r}")
        self.decisions.check(genotype.choices, f"genotype {genotype.id}")


class StandAlone:
    """A space whose bodies share no weights: it has no supernet and nothing to relax."""

    name: str

    def supernet(self, width: int) -> nn.Module:
        raise UserError(f"space {self.name!r} has no supernet: use an estimator that trains stand-alone models")

    def tables(self) -> tuple[EdgeTable, ...]:
        return ()

    def derive(self, mixture: Mixture) -> Genotype:
        raise UserError(f"space {self.name!r} has no mixture to derive from")

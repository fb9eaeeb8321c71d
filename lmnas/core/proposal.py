"""Proposals of a strategy and trials, their results. Both are small frozen values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lmnas.core.genotype import Genotype
from lmnas.core.length import Length

Status = Literal["ok", "diverged", "out-of-memory", "unscored", "failed"]


@dataclass(frozen=True)
class Proposal:
    """An architecture to be scored, and how.

    Attributes:
        budget: length of its training; None: the estimator's own.
        parent: number of the trial of this search whose training it continues, or whose weights it inherits.
        keep: its training state stays on disk, so that later proposals may name it as their parent.
    """

    genotype: Genotype
    budget: Length | None = None
    parent: int | None = None
    keep: bool = False

    def terms(self) -> dict[str, Any]:
        """Everything beyond the genotype that is not the default, as plain data."""
        terms: dict[str, Any] = {} if self.budget is None else {"budget": asdict(self.budget)}
        if self.parent is not None:
            terms["parent"] = self.parent
        return {**terms, "keep": True} if self.keep else terms

    @classmethod
    def from_terms(cls, genotype: Genotype, terms: Mapping[str, Any]) -> "Proposal":
        """The proposal that `terms` describe."""
        budget = terms.get("budget")
        return cls(genotype, budget and Length(**budget), terms.get("parent"), terms.get("keep", False))


@dataclass(frozen=True)
class Cost:
    """Price of a trial. Seconds are this machine's."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Trial:
    """A finished proposal.

    Attributes:
        number: position in its search, from 0: what `Proposal.parent` refers to.
        scores: value of every score by its name, the objective's first; empty when it failed.
        failure: one line that says why there are no scores.
        notes: plain data for the record.
    """

    proposal: Proposal
    number: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)
    status: Status = "ok"
    failure: str | None = None
    cost: Cost = field(default_factory=Cost)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def genotype(self) -> Genotype:
        return self.proposal.genotype

    @property
    def value(self) -> float | None:
        """The score by the objective; None when it failed."""
        return next(iter(self.scores.values()), None)

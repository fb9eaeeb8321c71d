"""Families of training-free metrics: each measures untrained networks of the bodies that it takes.

A further family is a class of this contract in a file of its own, and a line of kind `metric` in the registry.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lmnas.core import registry
from lmnas.core.capabilities import lacking, refuse_unfit
from lmnas.core.contracts import Body, Space
from lmnas.core.errors import UserError, nearest
from lmnas.core.genotype import Genotype

Values = dict[str, float | str]
"""Metric -> value, or the reason that it is undefined."""


@dataclass(frozen=True)
class Subject:
    """One architecture to be measured.

    Attributes:
        width: of the embeddings that its body reads.
        seed: of the weights and of the metrics' noise.
        text: makes (T, B) token ids and the size of their vocabulary.
        network: makes the initialised body and its (V, H) embedding.
        own_seed: of metrics that depend neither on the text nor on the model.
    """

    space: Space
    genotype: Genotype
    width: int
    seed: int
    text: Callable[[], tuple[Tensor, int]]
    network: Callable[[], tuple[Body, Tensor]]
    own_seed: int = 0


class Family(ABC):
    """Metrics that are measured together.

    Attributes:
        takes: what a body must be able to do.
        listed_for: bodies whose tables list the metrics, undefined where they do not fit; None: those that it takes.
        metrics: their names.
        shown: those that `lmnas score` shows unless others are asked for.
        reads_text: whether `measure` asks for the subject's text.
    """

    takes: frozenset[str]
    listed_for: frozenset[str] | None = None
    metrics: tuple[str, ...]
    shown: tuple[str, ...] = ()
    reads_text: bool = True

    @abstractmethod
    def measure(self, subject: Subject, metrics: Sequence[str]) -> Values:
        """The values of `metrics`, from passes that they share."""

    def sign(self, metric: str) -> int:
        """1 where a higher value goes with a better model, -1 where a lower one does."""
        return 1

    def n_inputs(self, subject: Subject) -> int:
        """Number of tokens (or of random inputs) that a network reads."""
        return subject.text()[0].numel()


def families() -> list[Family]:
    return [registry.component("metric", name)() for name in registry.names("metric")]


def family_of(metric: str, space: Space, where: str) -> Family:
    """The family that measures `metric` on bodies of `space`.

    Args:
        where: what messages call the metric's place.

    Raises:
        UserError: unknown, or of a family that does not fit.
    """
    known = families()
    fitting = [family for family in known if not lacking(family.takes, space.makes)]
    for family in fitting:
        if metric in family.metrics:
            return family
    for family in known:
        if metric in family.metrics:
            refuse_unfit(f"{where} {metric!r}", family.takes, space.name, space.makes)
    offered = [name for family in fitting for name in family.metrics]
    raise UserError(f"{where} {metric!r} is unknown. " + nearest(metric, offered))


def listed(makes: Iterable[str]) -> list[Family]:
    """The families whose metrics a table of such bodies lists."""
    words = frozenset(makes)
    return [family for family in families() if (family.listed_for or family.takes) <= words]


def measured(subject: Subject, metrics: Sequence[str]) -> Values:
    """The values of `metrics` in their order; those of a family that does not fit are undefined."""
    values: Values = {}
    for family in listed(subject.space.makes):
        chosen = [name for name in metrics if name in family.metrics]
        if missing := lacking(family.takes, subject.space.makes):
            values |= dict.fromkeys(chosen, f"space {subject.space.name!r} is no {' or '.join(sorted(missing))}")
        elif chosen:
            values |= family.measure(subject, chosen)
    return {name: values[name] for name in metrics}

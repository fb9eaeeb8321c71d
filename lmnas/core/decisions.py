"""A space's choices as data.

From the list of decisions alone come sampling, mutation, crossover, one-hot encoding, the size of the space, Optuna's
distributions and the action sequence of a reinforcement-learning controller: so every strategy works on every space
that states its decisions.
"""

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution as Categorical

from lmnas.core.errors import UserError, nearest

Option = str | int
Choices = dict[str, Any]


@dataclass(frozen=True)
class Decision(ABC):
    """One choice among `options`.

    Attributes:
        name: unique within the space, `node_3.input`.
        options: a decision with a single outcome is a constant that the genotype records.
        node: index of the graph node that the decision shapes; decisions of one node are adjacent, in node order.
        reads_node: the options are indices of earlier nodes (a controller may attend to them).
        when: (name of an earlier decision, its values) for which this one is active; None: always.
        graph: which graph the nodes belong to, where a space has several (a normal and a reduction cell).
    """

    name: str
    options: tuple[Option, ...]
    node: int | None = None
    reads_node: bool = False
    when: tuple[str, tuple[Option, ...]] | None = None
    graph: str = ""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of a controller's action: () for the index of an option, (K,) for a bit of each of K options."""

    @property
    @abstractmethod
    def picks(self) -> int | None:
        """Number of options that are chosen, one after the other; None: each is taken or left on its own."""

    @abstractmethod
    def action(self, value: Any) -> Any:
        """A value (None: not decided) as a controller's action, a number or a list of them."""

    @abstractmethod
    def from_action(self, action: Any) -> Any:
        """Value of an action."""

    @abstractmethod
    def count(self) -> int:
        """Number of values."""

    @abstractmethod
    def sample(self, rng: random.Random) -> Any:
        """A value, uniformly."""

    @abstractmethod
    def others(self, value: Any, rng: random.Random) -> Any:
        """Another value than `value`, near it; `value` itself if it is the only one."""

    @abstractmethod
    def encode(self, value: Any) -> list[float]:
        """A number for each option: 1 where `value` has it."""

    @abstractmethod
    def parameters(self, value: Any) -> dict[str, Any]:
        """`value` as Optuna parameters."""

    @abstractmethod
    def distributions(self) -> dict[str, Categorical]:
        """Optuna's distributions of the parameters."""

    @abstractmethod
    def from_parameters(self, parameters: Mapping[str, Any]) -> Any:
        """Value given by Optuna's parameters."""

    @abstractmethod
    def check(self, value: Any) -> str | None:
        """Fault of `value`, in words; None: it has none."""


@dataclass(frozen=True)
class OneOf(Decision):
    """Choose one of `options`; there is at least one."""

    shape = ()
    picks = 1

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"{self.name} has no options")

    def action(self, value: Any) -> int:
        return 0 if value is None else self.options.index(value)

    def from_action(self, action: int) -> Any:
        return self.options[action]

    def count(self) -> int:
        return len(self.options)

    def sample(self, rng: random.Random) -> Any:
        return rng.choice(self.options)

    def others(self, value: Any, rng: random.Random) -> Any:
        """Another option than `value`, uniformly; `value` itself if it is the only one."""
        rest = [option for option in self.options if option != value]
        return rng.choice(rest) if rest else value

    def encode(self, value: Any) -> list[float]:
        return [float(option == value) for option in self.options]

    def parameters(self, value: Any) -> dict[str, Any]:
        return {self.name: value}

    def distributions(self) -> dict[str, Categorical]:
        return {self.name: Categorical(self.options)}

    def from_parameters(self, parameters: Mapping[str, Any]) -> Any:
        return parameters[self.name]

    def check(self, value: Any) -> str | None:
        """Fault of `value`, in words; None: it has none. `True` does not equal 1 here, unlike in Python."""
        if any(option == value and type(option) is type(value) for option in self.options):
            return None
        return f"{value!r} is not one of {', '.join(map(str, self.options))}. " + nearest(value, map(str, self.options))


@dataclass(frozen=True)
class Subset(Decision):
    """Choose any subset of `options` (each bit on its own: skip connections), or exactly `size` of them (a node's two
    inputs). Values are lists in option order."""

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not 0 < self.size <= len(self.options):
            raise ValueError(f"{self.name} cannot have {self.size} of {len(self.options)} options")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.options),)

    @property
    def picks(self) -> int | None:
        return self.size

    def action(self, value: Any) -> list[bool]:
        return [option in (value or ()) for option in self.options]

    def from_action(self, action: list[bool]) -> list[Option]:
        return [option for option, bit in zip(self.options, action, strict=True) if bit]

    def count(self) -> int:
        return 2 ** len(self.options) if self.size is None else math.comb(len(self.options), self.size)

    def sample(self, rng: random.Random) -> list[Option]:
        if self.size is None:
            return [option for option in self.options if rng.random() < 0.5]
        return self._in_order(rng.sample(self.options, self.size))

    def others(self, value: list[Option], rng: random.Random) -> list[Option]:
        """`value` with one bit flipped; of a fixed size, one option exchanged."""
        if self.count() == 1:
            return value
        if self.size is None:
            flipped = rng.choice(self.options)
            return [option for option in self.options if (option in value) != (option == flipped)]
        out = rng.choice(value)
        new = rng.choice([option for option in self.options if option not in value])
        return self._in_order([*(option for option in value if option != out), new])

    def encode(self, value: list[Option]) -> list[float]:
        return [float(option in value) for option in self.options]

    def parameters(self, value: list[Option]) -> dict[str, Any]:
        """One parameter a bit: Optuna has no subset type. Of a fixed size, one for all: bits would allow any size."""
        if self.size is None:
            return {f"{self.name}.{option}": option in value for option in self.options}
        return {self.name: ",".join(map(str, value))}

    def distributions(self) -> dict[str, Categorical]:
        if self.size is None:
            return {f"{self.name}.{option}": Categorical([False, True]) for option in self.options}
        subsets = itertools.combinations(self.options, self.size)
        return {self.name: Categorical([",".join(map(str, subset)) for subset in subsets])}

    def from_parameters(self, parameters: Mapping[str, Any]) -> list[Option]:
        if self.size is None:
            return [option for option in self.options if parameters[f"{self.name}.{option}"]]
        chosen = parameters[self.name].split(",")
        return [option for option in self.options if str(option) in chosen]

    def check(self, value: Any) -> str | None:
        if not isinstance(value, list):
            return f"{value!r} is not a list of options"
        wrong = [item for item in value if not any(item == o and type(item) is type(o) for o in self.options)]
        if wrong:
            return f"{wrong[0]!r} is not one of {', '.join(map(str, self.options))}"
        if value != self._in_order(value):
            return f"{value!r} must name each option once, in the order {', '.join(map(str, self.options))}"
        if self.size is not None and len(value) != self.size:
            return f"{value!r} must name {self.size} of {', '.join(map(str, self.options))}"
        return None

    def _in_order(self, value: list[Option]) -> list[Option]:
        return [option for option in self.options if option in value]


class Decisions:
    """The ordered decisions of a space."""

    def __init__(self, decisions: Iterable[Decision]):
        self._decisions = tuple(decisions)
        names = [decision.name for decision in self._decisions]
        if len(set(names)) != len(names):
            raise ValueError("two decisions share a name")
        for position, decision in enumerate(self._decisions):
            if decision.when and decision.when[0] not in names[:position]:
                raise ValueError(f"{decision.name} depends on {decision.when[0]}, which is not decided before it")

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._decisions)

    def __len__(self) -> int:
        return len(self._decisions)

    def __getitem__(self, name: str) -> Decision:
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Decision]:
        return {decision.name: decision for decision in self}

    @staticmethod
    def is_active(decision: Decision, choices: Mapping[str, Any]) -> bool:
        """True if `decision` is asked at all, given the choices made before it."""
        return decision.when is None or choices.get(decision.when[0]) in decision.when[1]

    def sample(self, rng: random.Random, fixed: Mapping[str, Any] | None = None) -> Choices:
        """Draw every active decision uniformly, keeping the values in `fixed` where they are still active and valid."""
        choices: Choices = {}
        for decision in self:
            if self.is_active(decision, choices):
                keep = fixed is not None and decision.name in fixed and decision.check(fixed[decision.name]) is None
                choices[decision.name] = fixed[decision.name] if keep and fixed else decision.sample(rng)
        return choices

    def mutate(self, choices: Mapping[str, Any], rng: random.Random) -> Choices:
        """Change one decision (uniform over those that have another option); what becomes active is drawn anew."""
        free = [name for name in choices if self[name].count() > 1]
        if not free:
            return dict(choices)
        name = rng.choice(free)
        return self.sample(rng, {**choices, name: self[name].others(choices[name], rng)})

    def crossover(self, first: Mapping[str, Any], second: Mapping[str, Any], rng: random.Random) -> Choices:
        """Each decision from one parent or the other, uniformly; what only one parent decided comes from that one."""
        mixed = {
            decision.name: rng.choice([parent[decision.name] for parent in (first, second) if decision.name in parent])
            for decision in self
            if decision.name in first or decision.name in second
        }
        return self.sample(rng, mixed)

    def encode(self, choices: Mapping[str, Any]) -> list[float]:
        """One-hot (multi-hot for subsets) vector of fixed length; inactive decisions are zeros."""
        return [
            bit
            for decision in self
            for bit in (
                decision.encode(choices[decision.name]) if decision.name in choices else [0.0] * len(decision.options)
            )
        ]

    def size(self) -> int:
        """Exact number of distinct choices."""
        asked = {decision.when[0] for decision in self if decision.when}

        def count(position: int, choices: Choices) -> int:
            if position == len(self):
                return 1
            decision = self._decisions[position]
            if not self.is_active(decision, choices):
                return count(position + 1, choices)
            if decision.name not in asked:
                return decision.count() * count(position + 1, choices)
            return sum(count(position + 1, {**choices, decision.name: option}) for option in decision.options)

        return count(0, {})

    def distributions(self, choices: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """Optuna's distributions of the decisions in `choices`."""
        return {key: value for name in choices for key, value in self[name].distributions().items()}

    def parameters(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """`choices` as Optuna parameters."""
        return {key: value for name in choices for key, value in self[name].parameters(choices[name]).items()}

    def suggest(self, trial: Any) -> Choices:
        """Choices from an Optuna trial, one `suggest_categorical` per option asked for."""
        choices: Choices = {}
        for decision in self:
            if self.is_active(decision, choices):
                drawn = {
                    name: trial.suggest_categorical(name, distribution.choices)
                    for name, distribution in decision.distributions().items()
                }
                choices[decision.name] = decision.from_parameters(drawn)
        return choices

    def check(self, choices: Mapping[str, Any], where: str) -> None:
        """Refuse choices that are not exactly one value for every active decision.

        Raises:
            UserError: names the first decision that is unknown, missing, inactive or out of its options.
        """
        for name in choices:
            if name not in self._by_name:
                raise UserError(f"{where}: unknown decision {name!r}. " + nearest(name, self._by_name))
        for decision in self:
            active = self.is_active(decision, choices)
            if active and decision.name not in choices:
                raise UserError(f"{where}: decision {decision.name!r} is missing")
            if not active and decision.name in choices:
                raise UserError(f"{where}: {decision.name!r} has no effect here ({decision.when}); leave it out")
            if active and (wrong := decision.check(choices[decision.name])):
                raise UserError(f"{where}: {decision.name}: {wrong}")

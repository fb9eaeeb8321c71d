"""Length of a training: an amount of epochs, steps, tokens or seconds."""

from dataclasses import dataclass
from typing import Literal, get_args

from lmnas.core.errors import UserError, nearest

Unit = Literal["epochs", "steps", "tokens", "seconds"]
UNITS: tuple[Unit, ...] = get_args(Unit)


@dataclass(frozen=True)
class Length:
    """An amount of training in one unit: passes over the data, updates of the weights, predictions, or seconds."""

    amount: float
    unit: Unit = "epochs"

    @classmethod
    def parse(cls, text: str) -> "Length":
        """`5 epochs`, `2000 steps`, `1e6 tokens`, `90 seconds`; a number alone counts epochs.

        Raises:
            UserError: no positive number, or an unknown unit.
        """
        given, _, unit = text.strip().partition(" ")
        try:
            amount = float(given)
        except ValueError:
            amount = 0.0
        if not 0 < amount < float("inf"):
            raise UserError(f"length {text!r}: expected a positive number and a unit, such as '5 epochs'")
        for known in UNITS:
            if (unit.strip() or "epochs") in (known, known.removesuffix("s")):
                return cls(int(amount) if amount == int(amount) else amount, known)
        raise UserError(f"length {text!r}: unit {unit.strip()!r} is unknown. {nearest(unit.strip(), UNITS)}")

    def text(self) -> str:
        """`5 epochs`, `1 step`; `parse` reads it back."""
        return f"{self.amount} {self.unit if self.amount != 1 else self.unit.removesuffix('s')}"

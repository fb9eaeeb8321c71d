"""How long something trains: an amount of epochs, steps, tokens or seconds."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["epochs", "steps", "tokens", "seconds"]


@dataclass(frozen=True)
class Length:
    """An amount of training in one unit."""

    amount: float
    unit: Unit = "epochs"

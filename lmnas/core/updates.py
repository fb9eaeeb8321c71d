"""Messages of running work, as values that a remote worker can send."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Share of a job's work that is done: `done` of `total`, with a few words."""

    job: str
    done: float
    total: float
    text: str = ""


@dataclass(frozen=True)
class Incident:
    """Trouble that a job met and survived, worth a line in the record."""

    job: str
    message: str


Update = Progress | Incident
Report = Callable[[Update], None]
Stop = Callable[[], bool]


def silent(update: Update) -> None:
    """Report nothing."""


def never() -> bool:
    """No stop was asked for."""
    return False

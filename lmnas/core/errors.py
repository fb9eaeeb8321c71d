"""Errors of the user in one line: what was given, what was expected, the nearest valid name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's. The command line prints its message alone and exits with 2."""


class NotFinite(Exception):
    """A loss, gradient or score that is NaN or infinite."""


class Diverged(Exception):
    """Training reached a loss or gradient that is not finite and could not recover.

    Attributes:
        step: optimiser steps taken when it happened.
        cause: one line for the record.
    """

    def __init__(self, step: int, cause: str):
        super().__init__(f"diverged at step {step}: {cause}")
        self.step = step
        self.cause = cause


class Unscored(Diverged):
    """A candidate that has no score (a proxy is undefined for it): a failed trial with its cause, like a divergence."""

    def __init__(self, cause: str):
        super().__init__(0, cause)
        self.args = (cause,)


class Emptied(Unscored):
    """Pruning that left nothing, no candidate of a search or no unit of a network: the cause says what to change."""


class Interrupted(Exception):
    """A stop was asked for (Ctrl-C, SIGTERM); the state is saved."""


def nearest(name: object, names: Iterable[str]) -> str:
    """A sentence offering the closest of `names`, or listing them when none is close."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names) or 'none'}."

"""Words for what a body can do, and the one rule: a part fits a space whose `makes` holds all that the part `takes`.

Spaces state `makes`; tasks, estimators, families of metrics and strategies state `takes`. A newcomer that needs a
further word adds its line here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmnas.core.errors import UserError, nearest

if TYPE_CHECKING:  # torch takes seconds to import, and listing components needs the words alone
    import torch

WORDS = {
    "causal": "an output depends on no later input",
    "bidirectional": "an output may depend on every input; `lengths` (B,) tell padding apart",
    "stateful": "a state is carried from one segment of a text to the next",
    "graph": "genotypes are graphs of named nodes {op, input}: the space is a `GraphSpace`",
    "transformer": "layers (`Body.stacked`) have `operation`, `projection`, `feed_forward`; a `max_length`",
    "encoder-decoder": "reads a source and a target sequence",
    "sequence": "(T, B, H) -> (T, B, F)",
    "image": "(B, 3, S, S) -> (B, F)",
}
"""Capabilities in their order in a sentence: "causal stateful sequence bodies"."""


def lacking(takes: Iterable[str], makes: Iterable[str]) -> frozenset[str]:
    """Words of `takes` that `makes` has not; empty where the part fits."""
    return frozenset(takes) - frozenset(makes)


def phrase(words: Iterable[str]) -> str:
    """`words` in the order of a sentence."""
    held = set(words)
    return " ".join(word for word in WORDS if word in held)


def refuse_unfit(part: str, takes: Iterable[str], space: str, makes: Iterable[str]) -> None:
    """Refuse a part that does not fit a space.

    Args:
        part: as the sentence names it, `task 'language-modeling'`.

    Raises:
        UserError
    """
    if lacking(takes, makes):
        raise UserError(f"{part} takes {phrase(takes)} bodies; space {space!r} makes {phrase(makes)} bodies")


def check_words(words: Iterable[str], where: str) -> None:
    """Refuse unknown words.

    Raises:
        UserError: names the word and the nearest known one.
    """
    for word in sorted(words):
        if word not in WORDS:
            raise UserError(f"{where}: capability {word!r} is unknown. " + nearest(word, WORDS))


@dataclass(frozen=True)
class Example:
    """Small inputs of a body, from what it is known to make: for contract tests and forecasts.

    Attributes:
        inputs: shape of the inputs.
        outputs: shape of the outputs.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, makes: Iterable[str], width: int, n_features: int, batch_size: int, size: int) -> "Example":
        """
        Args:
            width: H, what a sequence body reads.
            n_features: F, what the body gives.
            size: T, or the side S of an image.

        Raises:
            UserError: no inputs are known for these words.
        """
        if "sequence" in makes:
            return cls((size, batch_size, width), (size, batch_size, n_features))
        if "image" in makes:
            return cls((batch_size, 3, size, size), (batch_size, n_features))
        raise UserError(f"no example is known of {phrase(makes)} bodies")

    def draw(self, generator: "torch.Generator") -> "torch.Tensor":
        """Normal inputs in float64."""
        import torch

        return torch.randn(self.inputs, generator=generator, dtype=torch.float64)

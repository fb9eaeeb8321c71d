"""How many logits the loss holds at once: a run keeps the number, since sums depend on it in their last digits."""

from lmnas.kernels import cross_entropy

_DEFAULT = cross_entropy.CHUNK_ELEMENTS


def default_chunk() -> int:
    """Logits that the loss holds at once unless told otherwise."""
    return _DEFAULT


def set_chunk(elements: int) -> None:
    """Let the loss hold so many logits at once, in this process."""
    cross_entropy.CHUNK_ELEMENTS = elements

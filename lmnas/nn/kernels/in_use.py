"""The kernel that this process runs, as one frozen value, and the only place that holds it.

It is the process' and not the thread's: autograd runs backward passes on threads of its own.
"""

from dataclasses import dataclass

from lmnas.nn.kernel_table import PLAIN

DEFAULT_CHUNK = 5_000_000
"""Logits held at once: about the size of a processor's cache."""


@dataclass(frozen=True)
class Kernels:
    """Kernel and chunk size that this process uses.

    Attributes:
        kernel: a name of `KERNELS`.
        chunk: logits that the loss holds at once. Its sums depend on it in their last digits.
        planned: the kernel whose memory tensors of the `meta` device stand for.
    """

    kernel: str = PLAIN
    chunk: int = DEFAULT_CHUNK
    planned: str = PLAIN


_current = Kernels()


def current() -> Kernels:
    return _current


def put(kernels: Kernels) -> None:
    """Replace the value; `lmnas.nn.kernels.use` checks and compiles a kernel first."""
    global _current
    _current = kernels

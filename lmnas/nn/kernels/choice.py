"""The kernel that this process runs, as one frozen value, and the only place that holds it.

It is the process' and not the thread's: autograd runs backward passes on threads of its own.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmnas.core.errors import UserError, nearest
from lmnas.nn.kernel_table import KERNELS, PLAIN

if TYPE_CHECKING:
    from lmnas.nn.kernels.reference import Reference

DEFAULT_CHUNK = 5_000_000
"""Logits held at once: about the size of a processor's cache."""


@dataclass(frozen=True)
class Kernels:
    """What runs.

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


@cache
def kernel_named(name: str) -> "Reference":
    """The kernel of the table; not yet compiled.

    Raises:
        UserError: unknown.
    """
    if name not in KERNELS:
        raise UserError(f"kernel {name!r} is unknown. {nearest(name, KERNELS)}")
    module, _, attribute = KERNELS[name].partition(":")
    return vars(import_module(module))[attribute]()


def use(**changes: Any) -> None:
    """Change fields of `Kernels` for this process from here on; a kernel that must be compiled is compiled now.

    Raises:
        UserError: the kernel is unknown or cannot be had.
    """
    global _current
    if "kernel" in changes:
        kernel_named(changes["kernel"]).prepare()
    _current = replace(_current, **changes)


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[None]:
    """`use`, inside the block only: what was in use before comes back, whatever the block chose."""
    global _current
    before = _current
    try:
        use(**changes)
        yield
    finally:
        _current = before


def plain() -> contextlib.AbstractContextManager[None]:
    """Inside, the reference runs whatever was chosen: faster kernels are differentiable once, and backward only."""
    return using(kernel=PLAIN)


def planning(kernel: str) -> contextlib.AbstractContextManager[None]:
    """Inside, tensors of the `meta` device stand for what `kernel` would hold."""
    return using(planned=kernel)

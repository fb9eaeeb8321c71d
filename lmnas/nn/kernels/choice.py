"""Choice of the kernel that this process runs."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmnas.core.errors import UserError, nearest
from lmnas.nn.kernel_table import KERNELS, PLAIN
from lmnas.nn.kernels.in_use import current, put

if TYPE_CHECKING:
    from lmnas.nn.kernels.reference import Reference


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
        UserError: the kernel is unknown or unavailable.
    """
    if "kernel" in changes:
        kernel_named(changes["kernel"]).prepare()
    put(replace(current(), **changes))


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[None]:
    """`use`, inside the block only: what was in use before comes back, whatever the block chose."""
    before = current()
    try:
        use(**changes)
        yield
    finally:
        put(before)


def plain() -> contextlib.AbstractContextManager[None]:
    """Inside, the reference runs whatever was chosen: faster kernels are differentiable once, and backward only."""
    return using(kernel=PLAIN)


def planning(kernel: str) -> contextlib.AbstractContextManager[None]:
    """Inside, tensors of the `meta` device stand for what `kernel` would hold."""
    return using(planned=kernel)

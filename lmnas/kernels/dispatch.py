"""Which kernel runs the recurrent cell: the plain reference or the fused one, decided once per process.

`auto` takes the fused one where it is compiled already, or where enough work is ahead for compiling to pay; else the
reference. A process begins with the reference: both are exact, but their sums differ in order, so a run that is
continued must not change from one to the other; it asks `decide` once and keeps the answer.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from torch import Tensor

from lmnas.errors import UserError, nearest
from lmnas.kernels import fused, gemm, planned, reference
from lmnas.kernels.reference import BatchNorm, Program

Kernel = Literal["auto", "reference", "fused"]
Decided = Literal["reference", "fused"]

_setting: Kernel = "reference"
_decided: bool | None = False
"""Whether the fused kernel runs; None: not decided yet."""
_planned: Decided = "reference"
"""Whose memory tensors of the `meta` device stand for."""


def set_kernel(kernel: Kernel) -> None:
    """Choose for this process.

    Raises:
        UserError: unknown, or `fused` cannot be had.
    """
    global _setting, _decided
    if kernel not in get_args(Kernel):
        raise UserError(f"kernel {kernel!r} is unknown. {nearest(kernel, get_args(Kernel))}")
    if kernel == "fused":
        try:
            fused.load()
        except fused.Unavailable as problem:
            raise UserError(f"kernel 'fused': {problem}; 'auto' falls back to the reference") from problem
    _setting, _decided = kernel, None if kernel == "auto" else kernel == "fused"
    gemm.allowed = kernel != "reference"


def prepare(seconds_of_work_ahead: float) -> None:
    """Let `auto` compile if that pays: more work ahead, at the reference's speed, than compiling takes twice.

    Falls back to the reference, with one message, where the fused kernel cannot be had.
    """
    global _decided
    if _setting == "auto" and not _decided:
        _decided = _loads(compiling=seconds_of_work_ahead > 2 * fused.COMPILE_SECONDS)


def decide(seconds_of_work_ahead: Callable[[], float]) -> tuple[Decided, str]:
    """What `auto` means here, and why, in a few words; nothing is compiled yet.

    Args:
        seconds_of_work_ahead: at the reference's speed; asked only where the answer matters.
    """
    problem = unavailable()
    if problem:
        return "reference", problem
    if fused.is_cached():
        return "fused", "compiled already"
    seconds = seconds_of_work_ahead()
    if seconds > 2 * fused.COMPILE_SECONDS:
        return "fused", f"about {seconds:.0f} s of work at the plain kernel's speed pay for compiling"
    return "reference", f"about {seconds:.0f} s of work do not pay for compiling"


def unavailable() -> str | None:
    """Why the fused kernel cannot be had here, as far as is known before compiling; None: it can."""
    try:
        fused.library_path()
    except fused.Unavailable as problem:
        return str(problem)
    return None


def must_compile() -> bool:
    """Whether taking the fused kernel would compile it first."""
    return unavailable() is None and not fused.is_cached()


@contextlib.contextmanager
def planning(kernel: Decided) -> Iterator[None]:
    """Inside, tensors of the `meta` device stand for what `kernel` would hold."""
    global _planned
    before, _planned = _planned, kernel
    try:
        yield
    finally:
        _planned = before


def _loads(compiling: bool) -> bool:
    if not (compiling or fused.is_cached()):
        return False
    try:
        fused.load()
    except fused.Unavailable as problem:
        logging.getLogger("lmnas").warning("kernel: the plain reference runs, which is slower: %s", problem)
        return False
    return True


def kernel_in_use() -> Literal["reference", "fused"]:
    """What runs the recurrent cell on the CPU in float32 and float64; other devices and types run the reference."""
    global _decided
    if _decided is None:
        _decided = _loads(compiling=False)
    return "fused" if _decided else "reference"


def recurrent_path(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    program: Program,
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
) -> Tensor:
    """`reference.recurrent_path` by the kernel in use."""
    if inputs.device.type == "meta" and _planned == "fused":
        return planned.recurrent(inputs, state, (w_input, *w_nodes), len(program.inputs), len(program.inputs))
    chosen = fused if _fused_takes(inputs, state, (w_input, *w_nodes), mask_x, mask_h) else reference
    return chosen.recurrent_path(inputs, state, w_input, w_nodes, program, mask_x, mask_h, batch_norm)


def recurrent_mixture(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    p_input: Tensor,
    p_edges: Tensor,
    output_weights: Tensor,
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
) -> Tensor:
    """`reference.recurrent_mixture` by the kernel in use."""
    weights = (w_input, *w_nodes, p_input, p_edges, output_weights)
    if inputs.device.type == "meta" and _planned == "fused":
        return planned.recurrent(inputs, state, weights, len(output_weights) - 1, len(p_edges))
    chosen = fused if _fused_takes(inputs, state, weights, mask_x, mask_h) else reference
    return chosen.recurrent_mixture(
        inputs, state, w_input, w_nodes, p_input, p_edges, output_weights, mask_x, mask_h, batch_norm
    )


def _fused_takes(
    inputs: Tensor, state: Tensor, weights: Sequence[Tensor], mask_x: Tensor | None, mask_h: Tensor | None
) -> bool:
    return kernel_in_use() == "fused" and fused.takes(inputs, state, weights, mask_x, mask_h)

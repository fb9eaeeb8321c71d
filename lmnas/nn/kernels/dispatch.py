"""Which kernel runs the recurrent cell and the softmax layer: the plain reference or the fused one.

`auto` takes the fused one where it is compiled already, or where enough work is ahead for compiling to pay; else the
reference. A process begins with the reference: both are exact, but their sums differ in order, so a run that is
continued must not change from one to the other; it asks `decide` once and keeps the answer.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from lmnas.core.errors import UserError, nearest
from lmnas.nn.kernels import cross_entropy, fused, graphs, planned, reference, segment
from lmnas.nn.kernels.reference import BatchNorm, Program

Decided = Literal["reference", "fused"]

_used: Decided = "reference"
_planned: Decided = "reference"
"""Whose memory tensors of the `meta` device stand for."""


def set_kernel(kernel: Decided) -> None:
    """Choose for this process; the fused kernel is compiled if it is not yet.

    Raises:
        UserError: unknown, or `fused` cannot be had.
    """
    global _used
    if kernel not in get_args(Decided):
        raise UserError(f"kernel {kernel!r} is unknown. {nearest(kernel, get_args(Decided))}")
    if kernel == "fused":
        try:
            fused.load()
        except fused.Unavailable as problem:
            raise UserError(f"kernel 'fused': {problem}; 'auto' falls back to the reference") from problem
    _used = kernel


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


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside, the reference runs whatever was chosen: faster kernels are differentiable once, and backward only."""
    global _used
    before, _used = _used, "reference"
    try:
        yield
    finally:
        _used = before


def kernel_in_use(device: str = "cpu") -> Literal["reference", "fused", "graphs"]:
    """What runs in float32 and float64; other types and devices run the reference.

    On a GPU `fused` means recorded graphs of the cell.
    """
    if device == "cpu":
        return _used
    return "graphs" if device == "cuda" and _used == "fused" else "reference"


def recurrent_path(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    program: Program,
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
    sampled: bool = False,
) -> Tensor:
    """`reference.recurrent_path` by the kernel in use.

    Args:
        sampled: other programs follow in other calls, so that nothing costly should be prepared for this one.
    """
    weights = (w_input, *w_nodes)
    if inputs.device.type == "meta" and _planned == "fused":
        return planned.recurrent(inputs, state, weights, len(program.inputs), len(program.inputs))
    if _graphs_take(inputs, state, weights, mask_x, mask_h):
        return graphs.recurrent_path(
            inputs, state, w_input, w_nodes, program, mask_x, mask_h, batch_norm, sampled=sampled
        )
    chosen = fused if _fused_takes(inputs, state, weights, mask_x, mask_h) else reference
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
    chosen: Any = reference
    if _graphs_take(inputs, state, weights, mask_x, mask_h):
        chosen = graphs
    elif _fused_takes(inputs, state, weights, mask_x, mask_h):
        chosen = fused
    return chosen.recurrent_mixture(
        inputs, state, w_input, w_nodes, p_input, p_edges, output_weights, mask_x, mask_h, batch_norm
    )


def recurrent_path_many(
    inputs: Tensor,
    state: Tensor,
    w_input: Tensor,
    w_nodes: Sequence[Tensor],
    programs: Program | Sequence[Program],
    mask_x: Tensor | None = None,
    mask_h: Tensor | None = None,
    batch_norm: BatchNorm = "none",
) -> Tensor:
    """`segment.recurrent_path_many`, several seeds at once: recorded where graphs run."""
    weights = (w_input, *w_nodes)
    chosen: Any = graphs if _graphs_take(inputs, state, weights, mask_x, mask_h) else segment
    return chosen.recurrent_path_many(inputs, state, w_input, w_nodes, programs, mask_x, mask_h, batch_norm)


def recurrent_mixture_many(
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
    """`segment.recurrent_mixture_many`, several seeds at once: recorded where graphs run."""
    weights = (w_input, *w_nodes, p_input, p_edges, output_weights)
    chosen: Any = graphs if _graphs_take(inputs, state, weights, mask_x, mask_h) else segment
    return chosen.recurrent_mixture_many(
        inputs, state, w_input, w_nodes, p_input, p_edges, output_weights, mask_x, mask_h, batch_norm
    )


def _fused_takes(
    inputs: Tensor, state: Tensor, weights: Sequence[Tensor], mask_x: Tensor | None, mask_h: Tensor | None
) -> bool:
    return _used == "fused" and fused.takes(inputs, state, weights, mask_x, mask_h)


def _graphs_take(
    inputs: Tensor, state: Tensor, weights: Sequence[Tensor], mask_x: Tensor | None, mask_h: Tensor | None
) -> bool:
    return kernel_in_use(inputs.device.type) == "graphs" and graphs.takes(inputs, state, weights, mask_x, mask_h)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100
) -> Tensor:
    """`cross_entropy.linear_cross_entropy` by the kernel in use."""
    takes = _used == "fused" and fused.takes_plain(hidden, weight, *([] if bias is None else [bias]))
    chosen = fused if takes else cross_entropy
    return chosen.linear_cross_entropy(hidden, weight, bias, targets, ignore)

"""Which kernel runs the recurrent cell: the plain reference or the fused one, decided once per process.

`auto` takes the fused one where it is compiled already, or where `prepare` was told of enough work ahead for compiling
to pay; else the reference. The default is the reference: both are exact, but their sums differ in order, so a run that
is continued must not change from one to the other.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from lmnas.errors import UserError, nearest
from lmnas.kernels import fused, gemm, graphs, reference, segment
from lmnas.kernels.reference import BatchNorm, Program

Kernel = Literal["auto", "reference", "fused"]

_setting: Kernel = "reference"
_decided: bool | None = False
"""Whether the fused kernel runs; None: not decided yet."""


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


def _loads(compiling: bool) -> bool:
    if not (compiling or fused.is_cached()):
        return False
    try:
        fused.load()
    except fused.Unavailable as problem:
        logging.getLogger("lmnas").warning("kernel: the plain reference runs, which is slower: %s", problem)
        return False
    return True


def kernel_in_use(device: str = "cpu") -> Literal["reference", "fused", "graphs"]:
    """What runs the recurrent cell in float32 and float64; other types and devices run the reference.

    On a GPU everything but `reference` means recorded graphs.
    """
    global _decided
    if device != "cpu":
        return "graphs" if device == "cuda" and _setting != "reference" else "reference"
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
    sampled: bool = False,
) -> Tensor:
    """`reference.recurrent_path` by the kernel in use.

    Args:
        sampled: other programs follow in other calls, so that nothing costly should be prepared for this one.
    """
    weights = (w_input, *w_nodes)
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
    return kernel_in_use() == "fused" and fused.takes(inputs, state, weights, mask_x, mask_h)


def _graphs_take(
    inputs: Tensor, state: Tensor, weights: Sequence[Tensor], mask_x: Tensor | None, mask_h: Tensor | None
) -> bool:
    return kernel_in_use(inputs.device.type) == "graphs" and graphs.takes(inputs, state, weights, mask_x, mask_h)

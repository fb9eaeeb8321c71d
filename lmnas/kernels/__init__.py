"""Every hot operation behind one signature; `reference` defines what is right, `dispatch` chooses what runs."""

from lmnas.kernels.chunks import default_chunk, set_chunk
from lmnas.kernels.cross_entropy import linear_cross_entropy
from lmnas.kernels.dispatch import (
    Decided,
    Kernel,
    decide,
    kernel_in_use,
    must_compile,
    planning,
    prepare,
    recurrent_mixture,
    recurrent_path,
    set_kernel,
    unavailable,
)
from lmnas.kernels.reference import OPS, BatchNorm, Program, edges, first_edge

__all__ = [
    "OPS",
    "BatchNorm",
    "Decided",
    "Kernel",
    "Program",
    "decide",
    "default_chunk",
    "edges",
    "first_edge",
    "kernel_in_use",
    "linear_cross_entropy",
    "must_compile",
    "planning",
    "prepare",
    "recurrent_mixture",
    "recurrent_path",
    "set_chunk",
    "set_kernel",
    "unavailable",
]

"""Every hot operation behind one signature; `reference` defines what is right, `dispatch` chooses what runs."""

from lmnas.nn.kernels.cross_entropy import DEFAULT_CHUNK, set_chunk
from lmnas.nn.kernels.dispatch import (
    Decided,
    decide,
    kernel_in_use,
    linear_cross_entropy,
    must_compile,
    plain,
    planning,
    recurrent_mixture,
    recurrent_mixture_many,
    recurrent_path,
    recurrent_path_many,
    set_kernel,
    unavailable,
)
from lmnas.nn.kernels.reference import OPS, BatchNorm, Program, edges, first_edge

__all__ = [
    "DEFAULT_CHUNK",
    "OPS",
    "BatchNorm",
    "Decided",
    "Program",
    "decide",
    "edges",
    "first_edge",
    "kernel_in_use",
    "linear_cross_entropy",
    "must_compile",
    "plain",
    "planning",
    "recurrent_mixture",
    "recurrent_mixture_many",
    "recurrent_path",
    "recurrent_path_many",
    "set_chunk",
    "set_kernel",
    "unavailable",
]

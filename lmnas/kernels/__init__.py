"""Every hot operation behind one signature; `reference` defines what is right, `dispatch` chooses what runs."""

from lmnas.kernels.cross_entropy import linear_cross_entropy
from lmnas.kernels.dispatch import (
    Kernel,
    kernel_in_use,
    prepare,
    recurrent_mixture,
    recurrent_mixture_many,
    recurrent_path,
    recurrent_path_many,
    set_kernel,
)
from lmnas.kernels.reference import OPS, BatchNorm, Program, edges, first_edge

__all__ = [
    "OPS",
    "BatchNorm",
    "Kernel",
    "Program",
    "edges",
    "first_edge",
    "kernel_in_use",
    "linear_cross_entropy",
    "prepare",
    "recurrent_mixture",
    "recurrent_mixture_many",
    "recurrent_path",
    "recurrent_path_many",
    "set_kernel",
]

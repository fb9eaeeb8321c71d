"""Every hot operation behind one signature; `reference` defines what is right, `dispatch` runs the kernel chosen."""

from lmnas.nn.kernels.choice import plain, planning, use, using
from lmnas.nn.kernels.dispatch import (
    decide,
    keeps_a_block,
    kernel_in_use,
    linear_cross_entropy,
    must_compile,
    recurrent_mixture,
    recurrent_path,
    unavailable,
)
from lmnas.nn.kernels.in_use import DEFAULT_CHUNK, Kernels, current
from lmnas.nn.kernels.reference import OPS, BatchNorm, Operands, Program, edges, first_edge

__all__ = [
    "DEFAULT_CHUNK",
    "OPS",
    "BatchNorm",
    "Kernels",
    "Operands",
    "Program",
    "current",
    "decide",
    "edges",
    "first_edge",
    "keeps_a_block",
    "kernel_in_use",
    "linear_cross_entropy",
    "must_compile",
    "plain",
    "planning",
    "recurrent_mixture",
    "recurrent_path",
    "unavailable",
    "use",
    "using",
]

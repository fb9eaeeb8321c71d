"""Every hot operation behind one signature; `reference` defines what is right."""

from lmnas.kernels.cross_entropy import linear_cross_entropy
from lmnas.kernels.reference import OPS, BatchNorm, Program, edges, first_edge, recurrent_mixture, recurrent_path

__all__ = [
    "OPS",
    "BatchNorm",
    "Program",
    "edges",
    "first_edge",
    "linear_cross_entropy",
    "recurrent_mixture",
    "recurrent_path",
]

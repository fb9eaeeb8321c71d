"""Nests of tensors: a tensor, or tuples, lists and dicts of nests; what batches and carried states are made of."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Nest = Any
"""A tensor, or a tuple, list or dict of nests; it may also hold None and plain values. Its user knows the form."""


def map_tensors(function: Callable[[Tensor], Any], nest: Nest) -> Nest:
    """The same nest with `function` applied to every tensor; other values are kept."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, dict):
        return {key: map_tensors(function, part) for key, part in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)(map_tensors(function, part) for part in nest)
    return nest


def detach(nest: Nest) -> Nest:
    """The same values without their history."""
    return map_tensors(Tensor.detach, nest)

"""Second derivatives: of a supernet's loss by its mixture (`diagonal`), of a plain recurrent network's by its weights
(`chain`), of a language model's by all of its weights (`weights`), and of any function of a tensor (`generic`)."""

from lmnas.nn.curvature.chain import Chain, ChainCurvature, chain_diagonal
from lmnas.nn.curvature.generic import (
    exact_diagonal,
    gauss_newton_diagonal,
    hutchinson_diagonal,
    softmax_form,
    squared_gradients,
)
from lmnas.nn.curvature.models import METHODS, Method, RecurrentSupernet, diagonal
from lmnas.nn.curvature.recurrent import recurrent_diagonal, softmax_head
from lmnas.nn.curvature.weights import WEIGHT_METHODS, recursion_weights, sampled_weights

__all__ = [
    "METHODS",
    "WEIGHT_METHODS",
    "Chain",
    "ChainCurvature",
    "Method",
    "RecurrentSupernet",
    "chain_diagonal",
    "diagonal",
    "exact_diagonal",
    "gauss_newton_diagonal",
    "hutchinson_diagonal",
    "recurrent_diagonal",
    "recursion_weights",
    "sampled_weights",
    "softmax_form",
    "softmax_head",
    "squared_gradients",
]

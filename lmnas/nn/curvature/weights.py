"""Curvature of a language model's loss by its weights: the diagonal of the Gauss-Newton matrix, one number a weight.

E is the mean loss of a prediction without dropout and penalties, as for a mixture (`models`). Two ways:

    sampled     squared gradients of every sequence's summed log-likelihood, labels drawn from the model: unbiased,
                with what couples time steps, for any model; one backward pass a sequence
    recursion   through time (`chain`), without D so that nothing is negative: plain recurrent layers, one alone
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmnas.core.contracts import Batch, SoftmaxModel, State
from lmnas.core.errors import UserError
from lmnas.core.nests import map_tensors
from lmnas.core.seeds import generator
from lmnas.nn.curvature.chain import Chain, chain_diagonal

WEIGHT_METHODS = ("sampled", "recursion")


def _column(state: State, b: int) -> State:
    """One sequence's part of a carried state."""
    return map_tensors(lambda part: part[..., b : b + 1, :], state)


def sampled_weights(model: SoftmaxModel, batches: Sequence[Batch], seed: int, index: int = 0) -> dict[str, Tensor]:
    """Estimates by parameter name, from batches with the states they begin with.

    Args:
        seed, index: the labels' generator is the index-th of this seed.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    noise, n_targets = generator(seed, "curvature", "labels", index), 0
    for batch in batches:
        for b in range(batch.inputs.shape[1]):
            targets = batch.targets[:, b : b + 1]
            one = Batch(batch.inputs[:, b : b + 1], targets, targets.numel(), state=_column(batch.state, b))
            features = model.features(one)
            weight, bias = model.output_layer()
            logits = F.linear(features, weight, bias)
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=noise)[:, 0]
            loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(totals, found, strict=True):
                total.addcmul_(gradient, gradient)
            n_targets += one.n_targets
    return {name: total.div_(n_targets) for name, total in zip(names, totals, strict=True)}


@torch.no_grad()
def recursion_weights(model: SoftmaxModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The recursion's, for a tied model of one plain recurrent layer. What embedding rows get as inputs and as the
    softmax layer's weights is added; biases get the curvature of what they are added to.

    Raises:
        UserError: another body.
    """
    layers = model.body.stacked()
    if len(layers) != 1 or not isinstance(layers[0], nn.RNN):
        raise UserError("curvature 'recursion': expected a body of one plain recurrent layer; use 'sampled'")
    layer: Any = layers[0]
    w_i, w_x = layer.weight_ih_l0, layer.weight_hh_l0
    embedding, bias_out = model.output_layer()
    chain = Chain(w_x, w_i, embedding, layer.bias_ih_l0 + layer.bias_hh_l0, bias_out, layer.nonlinearity)
    totals = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    n_targets = sum(batch.n_targets for batch in batches)
    for batch in batches:
        steps, size = batch.inputs.shape
        inputs = model.embedded(batch, {})
        state = model.body.hidden(model.body.initial_state(size) if batch.state is None else batch.state)[0]
        each = inputs.new_full((steps,), 1.0 / n_targets)
        found = chain_diagonal(chain, inputs, state, batch.targets, weights=each, curved=False)
        totals["body.layers.0.weight_ih_l0"] += found.w_i
        totals["body.layers.0.weight_hh_l0"] += found.w_x
        for bias in ("bias_ih_l0", "bias_hh_l0"):
            totals[f"body.layers.0.{bias}"] += found.pre.sum((0, 1))
        by_input = found.pre @ w_i.square()
        totals["embedding"] += found.w_o
        totals["embedding"].index_add_(0, batch.inputs.flatten(), by_input.flatten(0, 1))
        if bias_out is not None:
            features = model.features(batch)
            p = F.linear(features, embedding, bias_out).softmax(-1)
            totals["bias"] += (p * (1 - p)).sum(0) / n_targets
    return totals

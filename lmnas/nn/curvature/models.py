"""Curvature of a supernet's loss by the entries of its mixture: H_e = d²E / dw_e², one number an entry.

E is the mean loss of a prediction on one batch, without dropout and penalties:
`model(batch, carry, {}, mixture, False)`. The carried state is a constant, as in training.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmnas.core.contracts import Batch, Choice, Mixture, State
from lmnas.core.errors import UserError, nearest
from lmnas.core.seeds import generator
from lmnas.nn.curvature.generic import (
    chunk_of,
    exact_diagonal,
    gauss_newton_diagonal,
    hutchinson_diagonal,
    softmax_form,
    squared_gradients,
)
from lmnas.nn.curvature.recurrent import recurrent_diagonal, recurrent_squared_gradients, softmax_head
from lmnas.nn.kernels import OPS, plain


@runtime_checkable
class Classifier(Protocol):
    """What a model must have: a linear layer and softmax on features, with the mean cross-entropy as its loss."""

    def features(self, batch: Batch, carry: State, choice: Choice = None) -> Tensor:
        """(N, H) without dropout, one row for each of the flattened targets."""
        ...

    def output_layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V, H) and bias (V,)."""
        ...


class _Flat:
    """The entries of a mixture as one vector and back."""

    def __init__(self, mixture: Mixture):
        self.shapes = {name: table.shape for name, table in mixture.items()}
        self.values = torch.cat([table.detach().flatten() for table in mixture.values()])

    def mixture(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@contextlib.contextmanager
def _constant(model: nn.Module) -> Iterator[None]:
    """Inside, no graph is built for the model's weights, and the plain kernel runs."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with plain():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _loss(model: Any, batch: Batch, carry: State, flat: _Flat) -> Callable[[Tensor], Tensor]:
    """E as a function of the entries; the library's cross-entropy can be differentiated twice, the kernels' cannot."""

    def loss(values: Tensor) -> Tensor:
        features = model.features(batch, carry, flat.mixture(values))
        return F.cross_entropy(F.linear(features, *model.output_layer()), batch.targets.flatten())

    return loss


def _probabilities(model: Any, batch: Batch, carry: State, mixture: Mixture) -> Tensor:
    """(N, V)."""
    with torch.no_grad():
        return F.linear(model.features(batch, carry, mixture), *model.output_layer()).softmax(-1)


Run = Callable[[Any, Batch, State, Mixture, torch.Generator, int], Mixture]
"""(model, batch, carry, mixture, noise, draws) -> second derivatives."""


def _exact(
    model: Any, batch: Batch, carry: State, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    flat = _Flat(mixture)
    with _constant(model):
        return flat.mixture(exact_diagonal(_loss(model, batch, carry, flat), flat.values))


def _hutchinson(
    model: Any, batch: Batch, carry: State, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    flat = _Flat(mixture)
    with _constant(model):
        return flat.mixture(hutchinson_diagonal(_loss(model, batch, carry, flat), flat.values, noise, draws))


def _gauss_newton(
    model: Any, batch: Batch, carry: State, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    flat = _Flat(mixture)
    weight, _ = model.output_layer()
    with _constant(model):
        form = softmax_form(_probabilities(model, batch, carry, mixture), weight)
        # what a step of the cell holds for one tangent is a few dozen times what it puts out
        chunk = chunk_of(8 * batch.targets.numel() * weight.shape[1])
        return flat.mixture(
            gauss_newton_diagonal(
                lambda values: model.features(batch, carry, flat.mixture(values)), flat.values, form, chunk
            )
        )


def _sampled(
    model: Any, batch: Batch, carry: State, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    """The loss of a sequence is that of a batch of its own, so the model may not couple sequences (batch norm does)."""
    body: Any = getattr(model, "body", None)
    if getattr(getattr(body, "space", None), "batch_norm", "none") != "none":
        raise UserError(
            f"curvature 'sampled': batch_norm {body.space.batch_norm!r} couples the sequences of a batch, whose "
            "gradients are squared one by one; set it to 'none', or take 'gauss-newton'"
        )
    if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        raise UserError(
            "curvature 'sampled': batch norm in training mode couples the examples of a batch, whose gradients are "
            "squared one by one; call eval() on the model, or take 'gauss-newton'"
        )
    cell = _cell(model, batch, carry, mixture)
    if cell is not None and not cell.weighs_nodes:
        return _sampled_cell(model, batch, cell, mixture, noise, draws)
    flat = _Flat(mixture)
    axis = batch.targets.dim() - 1
    n_sequences = batch.targets.shape[axis]
    if carry is None and hasattr(body, "initial_state"):
        carry = body.initial_state(n_sequences)
    states = () if carry is None else (carry,)
    state_dims = tuple(_map(state, lambda part: part.dim() - 2) for state in states)
    total = torch.zeros_like(flat.values)

    def log_likelihood(values: Tensor, inputs: Tensor, labels: Tensor, *states: State) -> Tensor:
        alone = Batch(inputs.unsqueeze(axis), labels.unsqueeze(axis))
        state = _map(states[0], lambda part: part.unsqueeze(-2)) if states else None
        features = model.features(alone, state, flat.mixture(values))
        return -F.cross_entropy(F.linear(features, *model.output_layer()), labels.flatten(), reduction="sum")

    with _constant(model):
        probabilities = _probabilities(model, batch, carry, mixture)
        for _ in range(draws):
            labels = _draw(probabilities, noise).view_as(batch.targets)
            examples, dims = (batch.inputs, labels, *states), (axis, axis, *state_dims)
            total += squared_gradients(log_likelihood, flat.values, examples, dims)
    return flat.mixture(total / (draws * batch.targets.numel()))


def _draw(probabilities: Tensor, noise: torch.Generator) -> Tensor:
    """One class for each row of (N, V): where the cumulated probability passes a uniform number. `multinomial` draws a
    number for every class, which takes longer than the network."""
    cumulated = probabilities.cumsum(-1)
    uniform = torch.rand(len(cumulated), 1, generator=noise, device=noise.device, dtype=cumulated.dtype)
    found = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)[:, 0]
    return found.clamp_(max=cumulated.shape[1] - 1)


def _map(state: State, function: Callable[[Tensor], Any]) -> Any:
    return function(state) if isinstance(state, Tensor) else tuple(_map(part, function) for part in state)


class _Cell(NamedTuple):
    """A recurrent cell's supernet, as its kernel takes it; `weighs_nodes`: the mixture also weighs the nodes in h_t."""

    arguments: tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]
    tables: Any
    weighs_nodes: bool

    def named(self, by_input: Tensor, by_edges: Tensor, mixture: Mixture) -> dict[str, Tensor]:
        """From operation codes, (K,) and (E, K), to the columns of the mixture's tables."""
        found = {"input": by_input[None], "nodes": by_edges}
        result = {name: torch.zeros_like(table) for name, table in mixture.items()}
        for table in self.tables:
            for column, op in enumerate(table.ops):
                if op in OPS:
                    result[table.name][:, column] = found[table.name][:, OPS.index(op)]
        return result


def _cell(model: Any, batch: Batch, carry: State, mixture: Mixture) -> _Cell | None:
    """None: the body is another one."""
    body = getattr(model, "body", None)
    if body is None or not hasattr(body, "encode"):
        return None
    with torch.enable_grad():
        encoded = body.encode({name: table.detach().requires_grad_() for name, table in mixture.items()})
    inputs = model.embedded(batch, {}).detach()
    state = body.initial_state(inputs.shape[1]) if carry is None else carry
    p_input, p_edges, output_weights = (part.detach().to(inputs) for part in encoded)
    w_input, w_nodes = body.w_input.detach(), [weight.detach() for weight in body.w_nodes]
    arguments = (inputs, state, w_input, w_nodes, p_input, p_edges, output_weights)
    return _Cell(arguments, body.space.tables(), encoded[2].requires_grad)


def _output_layer(model: Any) -> tuple[Tensor, Tensor | None]:
    weight, bias = model.output_layer()
    return weight.detach(), None if bias is None else bias.detach()


def _sampled_cell(
    model: Any, batch: Batch, cell: _Cell, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    """The same as by a pass for every sequence, in one sweep."""
    weight, bias = _output_layer(model)
    total = {name: torch.zeros_like(table) for name, table in mixture.items()}

    def gradient(hs: Tensor) -> Tensor:
        """Of the summed log-likelihood of labels drawn from the model."""
        p = F.linear(hs.flatten(0, 1), weight, bias).softmax(-1)
        labels = _draw(p, noise)
        return (weight[labels] - p @ weight).view_as(hs)

    for _ in range(draws):
        squares = recurrent_squared_gradients(*cell.arguments, gradient)
        for name, found in cell.named(*squares, mixture).items():
            total[name] += found / (draws * batch.targets.numel())
    return total


def _recursion(
    model: Any, batch: Batch, carry: State, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    body: Any = getattr(model, "body", None)
    cell = _cell(model, batch, carry, mixture)
    if cell is None:
        raise UserError(
            f"curvature 'recursion': expected the supernet of a recurrent cell, got {type(body).__name__}; "
            "'gauss-newton' and 'sampled' take any supernet"
        )
    if body.space.batch_norm != "none":
        raise UserError(
            f"curvature 'recursion': batch_norm {body.space.batch_norm!r} couples the sequences of a batch, which a "
            "recursion by sequence cannot follow, and hides the size of the switches from the loss; set it to 'none'"
        )
    if cell.weighs_nodes:
        raise UserError(
            f"curvature 'recursion': with output {body.space.output!r} the mixture also weighs the nodes in h_t, which "
            "the recursion leaves out; set it to 'all-nodes', or take 'gauss-newton'"
        )
    weight, bias = _output_layer(model)
    found = recurrent_diagonal(*cell.arguments, softmax_head(weight, bias, batch.targets))
    return cell.named(found.input, found.edges, mixture)


@dataclass(frozen=True)
class Method:
    """A way to estimate the curvature.

    Attributes:
        run: does it for one batch.
        description: one line.
        exact: it is the second derivative itself; else an estimate of it, or of the Gauss-Newton part.
        draws: random draws if none are asked for; 0: it draws nothing.
    """

    run: Run
    description: str
    exact: bool
    draws: int = 0


METHODS: dict[str, Method] = {
    "exact": Method(_exact, "every component of the gradient differentiated: the oracle, one pass an entry", True),
    "gauss-newton": Method(
        _gauss_newton, "without the network's own curvature, never negative; one forward-mode pass an entry", False
    ),
    "sampled": Method(
        _sampled, "squared gradients of sequences whose labels the model draws: estimates gauss-newton", False, 1
    ),
    "hutchinson": Method(_hutchinson, "random signs times the Hessian: unbiased for exact, noisy", False, 10),
    "recursion": Method(
        _recursion, "diagonal second derivatives swept back through time, about the price of a gradient", False
    ),
}
"""By name. What each leaves out is in docs/curvature.md."""


def diagonal(
    method: str,
    model: nn.Module,
    batches: Sequence[tuple[Batch, State]],
    mixture: Mixture,
    seed: int,
    draws: int | None = None,
) -> dict[str, Tensor]:
    """Second derivatives of the loss by every entry of a mixture, averaged over batches.

    Args:
        method: a name in METHODS.
        model: a classifier (`Classifier`) around a supernet.
        batches: at least one, each with the state carried into it (None: the initial one), on the model's device.
        mixture: table name -> (E, K).
        seed: of the methods that draw.
        draws: random draws a batch; default: the method's own.

    Returns:
        Table name -> (E, K). Zero for entries that the network does not read, such as those of `none`.

    Raises:
        UserError: unknown method, or one that does not suit the model.
    """
    if method not in METHODS:
        raise UserError(f"curvature {method!r} is unknown. {nearest(method, METHODS)}")
    if draws is not None and draws < 1:
        raise UserError(f"curvature.draws: expected at least 1, got {draws}")
    if not isinstance(model, Classifier):
        raise UserError(f"curvature: {type(model).__name__} has no softmax layer on features, which its methods need")
    if not batches:
        raise ValueError("curvature of no batches")
    chosen = METHODS[method]
    total = {name: torch.zeros_like(table) for name, table in mixture.items()}
    for k, (batch, carry) in enumerate(batches):
        noise = generator(seed, "curvature", method, k, device=batch.targets.device)
        found = chosen.run(model, batch, carry, mixture, noise, chosen.draws if draws is None else draws)
        for name in total:
            total[name] += found[name] / len(batches)
    return {name: table.detach() for name, table in total.items()}

"""Curvature of a supernet's loss by the entries of its mixture: H_e = d²E / dw_e², one number an entry.

E is the mean loss of a prediction on one batch, without dropout and penalties:
`model(batch, {}, mixture, False)`. The carried state is a constant, as in training.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lmnas.core.contracts import Batch, EdgeTable, Mixture, Model, SoftmaxModel, State, Supernet
from lmnas.core.errors import UserError, nearest
from lmnas.core.nests import map_tensors
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


class RecurrentSupernet(Supernet):
    """A supernet that runs a mixture as one call of the recurrent kernels; curvature has sweeps of its own for it.

    Attributes:
        w_input, w_nodes: its weights, as the kernels take them.
        batch_norm, output: settings of its space.
    """

    w_input: Tensor
    w_nodes: nn.ParameterList
    batch_norm: str
    output: str

    @abstractmethod
    def tables(self) -> Sequence[EdgeTable]:
        """The mixture's tables."""

    @abstractmethod
    def encode(self, mixture: Mixture) -> tuple[Tensor, Tensor, Tensor]:
        """Weights by operation code, as the kernels take them: p_input (K,), p_edges (E, K), output_weights (N+1,)."""


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


def _loss(model: SoftmaxModel, batch: Batch, flat: _Flat) -> Callable[[Tensor], Tensor]:
    """E as a function of the entries; the library's cross-entropy can be differentiated twice, the kernels' cannot."""

    def loss(values: Tensor) -> Tensor:
        features = model.features(batch, flat.mixture(values))
        return F.cross_entropy(F.linear(features, *model.output_layer()), batch.targets.flatten())

    return loss


def _probabilities(model: SoftmaxModel, batch: Batch, mixture: Mixture) -> Tensor:
    """(N, V)."""
    with torch.no_grad():
        return F.linear(model.features(batch, mixture), *model.output_layer()).softmax(-1)


Run = Callable[[SoftmaxModel, Batch, Mixture, torch.Generator, int], Mixture]
"""(model, batch, mixture, noise, draws) -> second derivatives."""


def _exact(
    model: SoftmaxModel, batch: Batch, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    flat = _Flat(mixture)
    with _constant(model):
        return flat.mixture(exact_diagonal(_loss(model, batch, flat), flat.values))


def _hutchinson(
    model: SoftmaxModel, batch: Batch, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    flat = _Flat(mixture)
    with _constant(model):
        return flat.mixture(hutchinson_diagonal(_loss(model, batch, flat), flat.values, noise, draws))


def _gauss_newton(
    model: SoftmaxModel, batch: Batch, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    flat = _Flat(mixture)
    weight, _ = model.output_layer()
    with _constant(model):
        form = softmax_form(_probabilities(model, batch, mixture), weight)
        # what a step of the cell holds for one tangent is a few dozen times what it puts out
        chunk = chunk_of(8 * batch.n_targets * weight.shape[1])
        return flat.mixture(
            gauss_newton_diagonal(lambda values: model.features(batch, flat.mixture(values)), flat.values, form, chunk)
        )


def _sampled(
    model: SoftmaxModel, batch: Batch, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    """The loss of a sequence is that of a batch of its own, so the model may not couple sequences (batch norm does)."""
    body = model.body
    if body.batch_normed:
        norm = f"batch_norm {body.batch_norm!r}" if isinstance(body, RecurrentSupernet) else "its batch norm"
        raise UserError(
            f"curvature 'sampled': {norm} couples the sequences of a batch, whose gradients are squared one by one; "
            "set it to 'none', or take 'gauss-newton'"
        )
    if any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        raise UserError(
            "curvature 'sampled': batch norm in training mode couples the examples of a batch, whose gradients are "
            "squared one by one; call eval() on the model, or take 'gauss-newton'"
        )
    cell = _cell(model, batch, mixture)
    if cell is not None and not cell.weighs_nodes:
        return _sampled_cell(model, batch, cell, mixture, noise, draws)
    flat = _Flat(mixture)
    axis = batch.targets.dim() - 1
    n_sequences = batch.targets.shape[axis]
    state = body.initial_state(n_sequences) if batch.state is None else batch.state
    states = () if state is None else (state,)
    state_dims = map_tensors(lambda part: part.dim() - 2, states)
    total = torch.zeros_like(flat.values)

    def log_likelihood(values: Tensor, inputs: Tensor, labels: Tensor, *states: State) -> Tensor:
        state = map_tensors(lambda part: part.unsqueeze(-2), states[0]) if states else None
        alone = Batch(inputs.unsqueeze(axis), labels.unsqueeze(axis), labels.numel(), state=state)
        features = model.features(alone, flat.mixture(values))
        return -F.cross_entropy(F.linear(features, *model.output_layer()), labels.flatten(), reduction="sum")

    with _constant(model):
        probabilities = _probabilities(model, batch, mixture)
        for _ in range(draws):
            labels = _draw(probabilities, noise).view_as(batch.targets)
            examples, dims = (batch.inputs, labels, *states), (axis, axis, *state_dims)
            total += squared_gradients(log_likelihood, flat.values, examples, dims)
    return flat.mixture(total / (draws * batch.n_targets))


def _draw(probabilities: Tensor, noise: torch.Generator) -> Tensor:
    """One class for each row of (N, V): where the cumulated probability passes a uniform number. `multinomial` draws a
    number for every class, which takes longer than the network."""
    cumulated = probabilities.cumsum(-1)
    uniform = torch.rand(len(cumulated), 1, generator=noise, device=noise.device, dtype=cumulated.dtype)
    found = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)[:, 0]
    return found.clamp_(max=cumulated.shape[1] - 1)


class _Cell(NamedTuple):
    """A recurrent cell's supernet, as its kernel takes it; `weighs_nodes`: the mixture also weighs the nodes in h_t."""

    arguments: tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]
    tables: Sequence[EdgeTable]
    weighs_nodes: bool

    def named(self, by_input: Tensor, by_edges: Tensor, mixture: Mixture) -> dict[str, Tensor]:
        """Values by operation code, (K,) and (E, K), as columns of the mixture's tables."""
        found = {"input": by_input[None], "nodes": by_edges}
        result = {name: torch.zeros_like(table) for name, table in mixture.items()}
        for table in self.tables:
            for column, op in enumerate(table.ops):
                if op in OPS:
                    result[table.name][:, column] = found[table.name][:, OPS.index(op)]
        return result


def _cell(model: SoftmaxModel, batch: Batch, mixture: Mixture) -> _Cell | None:
    """None: the body is another one."""
    body = model.body
    if not isinstance(body, RecurrentSupernet):
        return None
    with torch.enable_grad():
        encoded = body.encode({name: table.detach().requires_grad_() for name, table in mixture.items()})
    inputs = model.embedded(batch, {}).detach()
    state = body.initial_state(inputs.shape[1]) if batch.state is None else batch.state
    p_input, p_edges, output_weights = (part.detach().to(inputs) for part in encoded)
    w_input, w_nodes = body.w_input.detach(), [weight.detach() for weight in body.w_nodes]
    arguments = (inputs, state, w_input, w_nodes, p_input, p_edges, output_weights)
    return _Cell(arguments, body.tables(), encoded[2].requires_grad)


def _output_layer(model: SoftmaxModel) -> tuple[Tensor, Tensor | None]:
    weight, bias = model.output_layer()
    return weight.detach(), None if bias is None else bias.detach()


def _sampled_cell(
    model: SoftmaxModel, batch: Batch, cell: _Cell, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    """The same as by a pass for every sequence, in one sweep."""
    weight, bias = _output_layer(model)
    total = {name: torch.zeros_like(table) for name, table in mixture.items()}

    def gradient(hs: Tensor) -> Tensor:
        """Gradient by `hs` (T, B, H) of the summed log-likelihood of labels drawn from the model."""
        p = F.linear(hs.flatten(0, 1), weight, bias).softmax(-1)
        labels = _draw(p, noise)
        return (weight[labels] - p @ weight).view_as(hs)

    for _ in range(draws):
        squares = recurrent_squared_gradients(*cell.arguments, gradient)
        for name, found in cell.named(*squares, mixture).items():
            total[name] += found / (draws * batch.n_targets)
    return total


def _recursion(
    model: SoftmaxModel, batch: Batch, mixture: Mixture, noise: torch.Generator, draws: int
) -> dict[str, Tensor]:
    body, cell = model.body, _cell(model, batch, mixture)
    if cell is None or not isinstance(body, RecurrentSupernet):
        raise UserError(
            f"curvature 'recursion': expected the supernet of a recurrent cell, got {type(body).__name__}; "
            "'gauss-newton' and 'sampled' take any supernet"
        )
    if body.batch_norm != "none":
        raise UserError(
            f"curvature 'recursion': batch_norm {body.batch_norm!r} couples the sequences of a batch, which a "
            "recursion by sequence cannot follow, and hides the size of the switches from the loss; set it to 'none'"
        )
    if cell.weighs_nodes:
        raise UserError(
            f"curvature 'recursion': with output {body.output!r} the mixture also weighs the nodes in h_t, which "
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
"""Name -> method; docs/curvature.md tells the terms that each leaves out."""


def diagonal(
    method: str,
    model: Model,
    batches: Sequence[Batch],
    mixture: Mixture,
    seed: int,
    draws: int | None = None,
) -> dict[str, Tensor]:
    """Second derivatives of the loss by every entry of a mixture, averaged over batches.

    Args:
        method: a name in METHODS.
        model: a `SoftmaxModel` around a supernet.
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
    if not isinstance(model, SoftmaxModel):
        raise UserError(f"curvature: {type(model).__name__} has no softmax layer on features, which its methods need")
    if not batches:
        raise ValueError("curvature of no batches")
    chosen = METHODS[method]
    total = {name: torch.zeros_like(table) for name, table in mixture.items()}
    for k, batch in enumerate(batches):
        noise = generator(seed, "curvature", method, k, device=batch.targets.device)
        found = chosen.run(model, batch, mixture, noise, chosen.draws if draws is None else draws)
        for name in total:
            total[name] += found[name] / len(batches)
    return {name: table.detach() for name, table in total.items()}

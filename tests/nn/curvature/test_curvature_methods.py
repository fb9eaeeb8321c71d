"""Every method against the exact second derivative, on small supernets before and after training."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import lmnas.nn.curvature.models
from lmnas.core.contracts import Batch, Body, Model, SoftmaxModel
from lmnas.core.errors import UserError
from lmnas.core.seeds import generator
from lmnas.nn.curvature import METHODS, diagonal, hutchinson_diagonal, softmax_head
from lmnas.nn.kernels import kernel_in_use, using
from lmnas.nn.kernels.fused import Fused
from lmnas.spaces.recurrent.cell import RecurrentCell
from lmnas.tasks.language_modeling import LanguageModel, ModelSettings

NODES, WIDTH, STEPS, BATCH, WORDS = 3, 8, 6, 4, 30
DOUBLE = torch.float64


class Setting:
    """A supernet on a text of cycles, its weights trained for so many steps."""

    def __init__(self, steps=0, seed=0, scale=0.35, **space):
        noise = generator(seed, "curvature models")
        self.space = RecurrentCell(**{"n_nodes": NODES, "batch_norm": "none", **space})
        self.model = LanguageModel(self.space.supernet(WIDTH), WORDS, ModelSettings(width=WIDTH, ar=1.0, tar=1.0))
        self.model.initialise(noise)
        self.model.double()
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, 0.0, scale, generator=noise)
        self.mixture = {}
        for table in self.space.tables():
            jitter = 1 + 0.3 * torch.randn(len(table.edges), len(table.ops), generator=noise, dtype=DOUBLE)
            nodes = torch.tensor([[max(node, 1)] for node, _ in table.edges], dtype=DOUBLE)
            self.mixture[table.name] = jitter / (4 * nodes)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        starts = torch.randint(WORDS, (steps + 1, BATCH), generator=noise)
        for start in starts:
            # each word is followed by one of two
            tokens = [start]
            for _ in range(STEPS):
                tokens.append((3 * tokens[-1] + torch.randint(2, (BATCH,), generator=noise)) % WORDS)
            text = torch.stack(tokens)
            batch = Batch(text[:-1], text[1:], text[1:].numel())
            loss, state = self.model(batch, {}, self.mixture, False)
            optimizer.zero_grad()
            if start is not starts[-1]:
                loss.backward()
                optimizer.step()
        self.batch = replace(batch, state=state)
        self.batches = [self.batch]

    def find(self, method, **options):
        """All tables as one vector, without the entries of `none`."""
        found = diagonal(method, self.model, self.batches, self.mixture, 0, **options)
        assert found.keys() == self.mixture.keys()
        if self.space.none:
            assert not found["nodes"][:, 0].any()
        return torch.cat([found[t.name][:, int("none" in t.ops) :].flatten() for t in self.space.tables()])

    def loss(self, mixture):
        with torch.no_grad():
            return self.model(self.batch, {}, mixture, False)[0].item()


@pytest.fixture(scope="module")
def trained():
    return Setting(steps=150)


@pytest.mark.parametrize("space", [{}, {"input_activation": "searched", "output": "loose-ends", "none": False}])
def test_exact_against_finite_differences(space):
    """Of the model's own loss without penalties, by the kernel in use: an independent path."""
    setting = Setting(n_nodes=2, activations=("tanh", "sigmoid", "identity"), **space)
    found = diagonal("exact", setting.model, setting.batches, setting.mixture, 0)
    step = 1e-3
    for name, table in setting.mixture.items():
        for i in range(table.numel()):
            values = []
            for shift in (-2, -1, 0, 1, 2):
                moved = table.flatten().clone()
                moved[i] += shift * step
                values.append(setting.loss({**setting.mixture, name: moved.view_as(table)}))
            # fourth order
            second = (-values[0] + 16 * values[1] - 30 * values[2] + 16 * values[3] - values[4]) / (12 * step**2)
            assert found[name].flatten()[i].item() == pytest.approx(second, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("steps", [0, 60])
@pytest.mark.parametrize("space", [{}, {"output": "loose-ends", "sharing": "edge", "batch_norm": "nodes"}])
def test_gauss_newton_is_that_of_the_jacobian(steps, space):
    """J^T Q J with the full Jacobian of all logits, Q = (diag(p) - p p^T) / N of each prediction."""
    setting = Setting(steps, n_nodes=2, **space)

    def logits(table):
        features = setting.model.features(setting.batch, {"nodes": table})
        return F.linear(features, *setting.model.output_layer())

    at = setting.mixture["nodes"]
    jacobian = torch.autograd.functional.jacobian(logits, at).flatten(2)  # (N, V, entries)
    p = logits(at).detach().softmax(-1)
    q = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / len(p)
    expected = torch.einsum("nve,nvw,nwe->e", jacobian, q, jacobian).view_as(at)
    found = diagonal("gauss-newton", setting.model, setting.batches, setting.mixture, 0)["nodes"]
    assert (found - expected).abs().max() < 1e-12 * expected.max() and expected.max() > 1e-3


def test_sampled_estimates_gauss_newton(trained):
    """Its expectation is the Gauss-Newton diagonal itself: labels are independent given the inputs, so products of the
    scores of two predictions vanish in expectation. Within five standard errors, which draws alone tell."""
    draws = torch.stack(
        [
            torch.cat([t.flatten() for t in found.values()])
            for found in (
                diagonal("sampled", trained.model, trained.batches, trained.mixture, seed) for seed in range(400)
            )
        ]
    )
    kept = draws[0] != 0
    error = (
        draws.mean(0) - diagonal("gauss-newton", trained.model, trained.batches, trained.mixture, 0)["nodes"].flatten()
    )
    standard = draws.std(0) / math.sqrt(len(draws))
    assert (error / standard)[kept].abs().max() < 5
    assert (standard / draws.mean(0))[kept].max() < 0.2  # so that the check means something
    # several draws in one call are their mean
    found = trained.find("sampled", draws=300)
    assert (found / trained.find("gauss-newton") - 1).abs().max() < 1.0


def test_sampled_in_one_sweep_is_a_pass_for_every_sequence(monkeypatch):
    setting = Setting(input_activation="searched", sharing="edge", activations=("relu", "sigmoid", "tanh"))
    in_one = setting.find("sampled", draws=2)
    monkeypatch.setattr(lmnas.nn.curvature.models, "_cell", lambda *arguments: None)
    one_by_one = setting.find("sampled", draws=2)
    assert (in_one - one_by_one).abs().max() < 1e-10 * one_by_one.max() and one_by_one.max() > 0


def test_labels_are_drawn_with_their_probabilities():
    """Chi-square over 10,000 draws of a row; the 1e-4 quantile of four degrees of freedom is 23.5."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025], dtype=DOUBLE)
    labels = lmnas.nn.curvature.models._draw(p.expand(10_000, 5), generator(0, "labels"))
    counts = torch.bincount(labels, minlength=5)
    assert ((counts - 10_000 * p).square() / (10_000 * p)).sum() < 23.5
    certain = torch.eye(5).repeat(3, 1)
    assert torch.equal(lmnas.nn.curvature.models._draw(certain, generator(0, "labels")), torch.arange(5).repeat(3))


def test_hutchinson_is_unbiased(trained):
    """Within five standard errors of exact, by its own variance: the squares off the diagonal."""
    noise = generator(5, "hutchinson")
    root = torch.randn(6, 6, generator=noise, dtype=DOUBLE)
    matrix = root + root.t()
    draws = 4000
    found = hutchinson_diagonal(lambda v: 0.5 * v @ matrix @ v, torch.zeros(6, dtype=DOUBLE), noise, draws)
    off = matrix.square().sum(1) - matrix.diagonal().square()
    errors = (found - matrix.diagonal()) / (off / draws).sqrt()
    assert errors.abs().max() < 5 and errors.abs().max() > 0.1

    values = trained.mixture["nodes"]

    def loss(values):
        features = trained.model.features(trained.batch, {"nodes": values})
        return F.cross_entropy(F.linear(features, *trained.model.output_layer()), trained.batch.targets.flatten())

    hessian = torch.autograd.functional.hessian(loss, values).view(values.numel(), -1)
    off = (hessian.square().sum(1) - hessian.diagonal().square()).view_as(values)
    found = diagonal("hutchinson", trained.model, trained.batches, trained.mixture, 1, draws=200)["nodes"]
    exact = diagonal("exact", trained.model, trained.batches, trained.mixture, 1)["nodes"]
    assert torch.allclose(exact, hessian.diagonal().view_as(values), rtol=1e-9)
    kept = off > 0
    assert ((found - exact)[kept] / (off[kept] / 200).sqrt()).abs().max() < 5


def test_methods_rank_switches_of_trained_networks_alike(trained):
    exact = trained.find("exact")
    correlations = {name: stats.spearmanr(exact, trained.find(name)).statistic for name in METHODS}
    assert correlations["gauss-newton"] > 0.9 and correlations["sampled"] > 0.8
    assert correlations["recursion"] > 0.5


def test_recursion_through_the_model_is_exact_for_one_step_of_one_node():
    """With one unit: every switch, by the model's own loss; softmax on one feature has an exact second derivative."""
    noise = generator(2, "one unit")
    space = RecurrentCell(n_nodes=1, batch_norm="none", input_activation="searched", activations=("relu", "tanh"))
    model = LanguageModel(space.supernet(1), 7, ModelSettings(width=1)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=noise)
    mixture = {
        "input": torch.tensor([[0.4, -0.7]], dtype=DOUBLE),
        "nodes": torch.tensor([[0.3, 0.6, 0.9]], dtype=DOUBLE),
    }
    batch = Batch(torch.randint(7, (1, 5), generator=noise), torch.randint(7, (1, 5), generator=noise), 5)
    batches = [replace(batch, state=torch.randn(5, 1, generator=noise, dtype=DOUBLE)), batch]
    exact = diagonal("exact", model, batches, mixture, 0)
    found = diagonal("recursion", model, batches, mixture, 0)
    for name in mixture:
        assert torch.allclose(found[name], exact[name], rtol=1e-10, atol=1e-14)
    assert exact["nodes"][0, 0] == 0 and exact["nodes"][0, 1:].abs().min() > 1e-3
    assert exact["input"].abs().min() > 1e-3


def test_softmax_head_is_exact():
    noise = generator(4, "head")
    weight, bias, hs = (torch.randn(*shape, generator=noise, dtype=DOUBLE) for shape in ((9, 4), (9,), (3, 2, 4)))
    targets = torch.randint(9, (3, 2), generator=noise)

    def loss(hs):
        return F.cross_entropy(F.linear(hs.flatten(0, 1), weight, bias), targets.flatten())

    gradient, curvature = softmax_head(weight, bias, targets)(hs)
    hessian = torch.autograd.functional.hessian(loss, hs).reshape(hs.numel(), hs.numel())
    assert torch.allclose(curvature, hessian.diagonal().view_as(hs), rtol=1e-10)
    leaf = hs.clone().requires_grad_()
    assert torch.allclose(gradient, torch.autograd.grad(loss(leaf), leaf)[0], rtol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_averaged_and_nothing_changes(method, trained):
    """The same seed, the same result; the model's weights want their gradients afterwards, and have none."""
    other = Setting(seed=3)
    batches = [*trained.batches, replace(other.batch, state=None)]
    mixture = trained.mixture
    found = diagonal(method, trained.model, batches, mixture, 7)["nodes"]
    again = diagonal(method, trained.model, batches, mixture, 7)["nodes"]
    assert torch.equal(found, again) and not found.requires_grad
    if METHODS[method].draws == 0:
        parts = [diagonal(method, trained.model, [batch], mixture, 7)["nodes"] for batch in batches]
        assert torch.allclose(found, sum(parts) / 2, rtol=1e-12)
    else:
        assert not torch.equal(found, diagonal(method, trained.model, batches, mixture, 8)["nodes"])
    assert all(p.requires_grad for p in trained.model.parameters()) and not mixture["nodes"].requires_grad
    floats = {name: table.float() for name, table in mixture.items()}
    if method != "hutchinson":  # whose noise is divided by values near zero here
        model = LanguageModel(trained.space.supernet(WIDTH), WORDS, ModelSettings(width=WIDTH))
        model.load_state_dict(trained.model.state_dict())
        small = diagonal(method, model, [replace(trained.batch, state=trained.batch.state.float())], floats, 7)["nodes"]
        large = diagonal(method, trained.model, trained.batches, mixture, 7)["nodes"]
        assert small.dtype == torch.float32
        if METHODS[method].draws == 0:
            assert (small - large).abs().max() < 1e-3 * large.max()


def test_every_method_runs_plain_kernels_whatever_was_chosen(monkeypatch, trained):
    """The fused kernel is differentiable once, and backward only."""

    def refuse(*arguments, **options):
        raise AssertionError("a kernel that has no second derivatives")

    expected = {name: trained.find(name) for name in METHODS}
    monkeypatch.setattr(Fused, "prepare", lambda self: None)
    monkeypatch.setattr(Fused, "recurrent_mixture", refuse)
    monkeypatch.setattr(Fused, "linear_cross_entropy", refuse)
    with using(kernel="fused"):
        with pytest.raises(AssertionError, match="no second derivatives"):
            trained.loss(trained.mixture)
        for name in METHODS:
            assert torch.equal(trained.find(name), expected[name])
        assert kernel_in_use() == "fused"


class NoClassifier(Model):
    initialise = forward = None


@pytest.mark.parametrize(
    "method, space, options, message",
    [
        ("recursoin", {}, {}, "curvature 'recursoin' is unknown. Did you mean 'recursion'?"),
        ("recursion", {"batch_norm": "nodes"}, {}, "batch_norm 'nodes' couples the sequences"),
        ("sampled", {"batch_norm": "output"}, {}, "batch_norm 'output' couples the sequences"),
        ("recursion", {"output": "loose-ends"}, {}, "output 'loose-ends' the mixture also weighs the nodes"),
        ("sampled", {}, {"draws": 0}, "curvature.draws: expected at least 1, got 0"),
    ],
)
def test_refusals(method, space, options, message):
    setting = Setting(n_nodes=1, **space)
    with pytest.raises(UserError) as refused:
        diagonal(method, setting.model, setting.batches, setting.mixture, 0, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value)


class Still(Body):
    """A body that nothing asks for more than its facts."""

    initialise = forward = None


class Pictures(SoftmaxModel):
    """A mixture of two linear maps with activations before a softmax: (B, 5) -> 3 classes, no state."""

    def __init__(self, norm=False):
        super().__init__()
        noise = generator(0, "pictures")
        self.maps = nn.Parameter(torch.randn(2, 5, 4, generator=noise, dtype=DOUBLE))
        self.head = nn.Parameter(torch.randn(3, 4, generator=noise, dtype=DOUBLE))
        self.body = Still(1)
        self.norm = nn.BatchNorm1d(4, affine=False).double() if norm else nn.Identity()

    initialise = forward = None

    def features(self, batch, choice=None):
        return self.norm(torch.einsum("k,bi,kih->bh", choice["ops"][0], batch.inputs, self.maps).tanh())

    def output_layer(self):
        return self.head, None


def test_models_without_time_or_state():
    noise = generator(1, "pictures")
    batch = Batch(torch.randn(40, 5, generator=noise, dtype=DOUBLE), torch.randint(3, (40,), generator=noise), 40)
    mixture = {"ops": torch.tensor([[0.7, 0.4]], dtype=DOUBLE)}
    model = Pictures()
    found = {name: diagonal(name, model, [batch], mixture, 0)["ops"] for name in ("exact", "gauss-newton")}
    logits = torch.autograd.functional.jacobian(
        lambda w: F.linear(model.features(batch, {"ops": w}), model.head), mixture["ops"]
    )
    p = F.linear(model.features(batch, mixture), model.head).softmax(-1)[..., None, None]
    expected = ((p * logits.square()).sum(1) - (p * logits).sum(1).square()).mean(0)
    assert torch.allclose(found["gauss-newton"], expected, rtol=1e-10)
    assert not torch.allclose(found["exact"], expected, rtol=1e-2)
    sampled = diagonal("sampled", model, [batch], mixture, 0, draws=300)["ops"]
    assert torch.allclose(sampled, expected, rtol=0.1)
    with pytest.raises(UserError, match="batch norm in training mode couples the examples"):
        diagonal("sampled", Pictures(norm=True), [batch], mixture, 0)
    assert diagonal("sampled", Pictures(norm=True).eval(), [batch], mixture, 0)["ops"].min() > 0


def test_models_that_do_not_suit():
    setting = Setting(n_nodes=1)
    with pytest.raises(UserError, match="NoClassifier has no softmax layer"):
        diagonal("exact", NoClassifier(), setting.batches, setting.mixture, 0)
    with pytest.raises(UserError, match="got Still"):
        model = LanguageModel(Still(1), 3, ModelSettings(width=1))
        diagonal("recursion", model, setting.batches, setting.mixture, 0)


def test_the_page_runs(capsys):
    """The example of docs/curvature.md."""
    page = (Path(__file__).parents[3] / "docs" / "curvature.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(f"{method} torch.Size([3, 5])" for method in METHODS), "tensor([ 6., 12.])"]

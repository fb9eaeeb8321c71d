"""Optimisers are torch's own, with parameter groups by role; their states survive a checkpoint."""

import pytest
import torch
from torch import nn

from lmnas.core import registry
from lmnas.core.checkpoints import pack, unpack
from lmnas.core.contracts import Body, Loss, Model
from lmnas.core.seeds import generator
from lmnas.nn.training.optimizers import make_optimizer
from lmnas.nn.training.settings import Factors, Optimizer, Roles

GIVEN = {"muon": {"momentum": 0.95, "nesterov": True}, "sgd": {"momentum": 0.9}}


class Inner(Body):
    def __init__(self):
        super().__init__(4)
        self.table, self.matrix = nn.Embedding(5, 4), nn.Linear(4, 4)

    def initialise(self, generator, init_range):
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.5, generator=generator)

    def forward(self, inputs, state, masks, choice=None):
        return self.matrix(inputs), None


class Toy(Model):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = Inner()

    def initialise(self, generator):
        self.body.initialise(generator, 0.5)
        for parameter in self.head.parameters():
            nn.init.normal_(parameter, 0.0, 0.5, generator=generator)

    def forward(self, batch, masks, choice=None, penalised=True):
        return Loss(self.head(self.body(self.body.table(batch), None, {})[0]).square().mean())


def toy():
    model = Toy()
    model.initialise(generator(0, "init"))
    return model


def steps(model, optimizer, n=3):
    for _ in range(n):
        optimizer.zero_grad(set_to_none=True)
        model(torch.arange(5), {}).value.backward()
        optimizer.step()


def test_roles_by_shape_and_place():
    assert toy().roles() == {
        "head.weight": "embedding",
        "head.bias": "gain",
        "body.table.weight": "embedding",
        "body.matrix.weight": "matrix",
        "body.matrix.bias": "gain",
    }


@pytest.mark.parametrize("method", registry.names("optimizer"))
def test_every_optimizer_lowers_the_loss_and_survives_a_checkpoint(method):
    settings = Optimizer(method=method, learning_rate=0.01, **GIVEN.get(method, {}))
    model = toy()
    optimizer = make_optimizer(model, settings)
    before = model(torch.arange(5), {}).value.item()
    steps(model, optimizer)
    saved = unpack(pack({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
    steps(model, optimizer)
    assert model(torch.arange(5), {}).value.item() < before
    again = toy()
    again.load_state_dict(saved["model"])
    restored = make_optimizer(again, settings)
    restored.load_state_dict(saved["optimizer"])
    steps(again, restored)
    for name, value in model.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name


@pytest.mark.parametrize(
    "method, given, make",
    [
        ("sgd", {"momentum": 0.9}, lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=0.1)),
        ("adam", {}, lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1)),
        (
            "adamw",
            {"betas": (0.8, 0.95), "epsilon": 1e-6},
            lambda p: torch.optim.AdamW(p, 0.01, (0.8, 0.95), 1e-6, weight_decay=0.1),
        ),
        ("adafactor", {}, lambda p: torch.optim.Adafactor(p, 0.01, weight_decay=0.1)),
    ],
)
def test_against_torch(method, given, make):
    model, twin = toy(), toy()
    steps(model, make_optimizer(model, Optimizer(method=method, learning_rate=0.01, weight_decay=0.1, **given)))
    steps(twin, make(twin.parameters()))
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, twin.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model, twin = toy(), toy()
    settings = Optimizer(method="muon", learning_rate=0.01, weight_decay=0.1, **GIVEN["muon"])
    steps(model, make_optimizer(model, settings))
    matrix = [twin.body.matrix.weight]
    others = [parameter for parameter in twin.parameters() if parameter is not matrix[0]]
    muon = torch.optim.Muon(matrix, 0.01, 0.1, 0.95, True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, 0.01, weight_decay=0.1)
    for _ in range(3):
        twin.zero_grad()
        twin(torch.arange(5), {}).value.backward()
        muon.step()
        adamw.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, twin.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_roles_have_factors_of_their_own():
    """Twice the rate on embeddings and heads, no decay on gains: one step of SGD by hand."""
    roles = Roles(embeddings=Factors(rate=2.0), gains=Factors(decay=0.0))
    model = toy()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    steps(model, make_optimizer(model, Optimizer(learning_rate=0.1, weight_decay=0.5, roles=roles)), 1)
    for name, value in model.named_parameters():
        rate = 0.2 if model.roles()[name] == "embedding" else 0.1
        decay = 0.0 if model.roles()[name] == "gain" else 0.5
        expected = before[name] - rate * (value.grad + decay * before[name])
        torch.testing.assert_close(value.detach(), expected)


def test_one_group_without_factors():
    """The form of the state in checkpoints of version 0.1.0."""
    state = make_optimizer(toy(), Optimizer()).state_dict()
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 2, 3, 4]]
    assert "factor" not in state["param_groups"][0]


def test_settings_of_other_optimizers_go_with_plain_sgd():
    adamw = Optimizer(method="adamw", learning_rate=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    assert adamw.plain_sgd() == Optimizer(learning_rate=0.01, weight_decay=0.1, averaging="none")

"""ENAS' macro space: counts by hand, a forward pass written out, paths against stand-alone networks (training mode)."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator
from lmnas.runs.build import covering_space
from lmnas.spaces.conv.macro import OPS, ConvMacro, first_pair

PUBLISHED = (
    "0 30 010 2001 20000 311010 2000001 20110111 101110101 0000000000 20000010000 010011000011 2010000010110 "
    "10010001110101 011010100000100 2001000000010101 20100010011110010 200001010100101001 3011010000010101000 "
    "30110000000001100001 010010110001000001100 3010110010110110100100 01010100000000101001000 011000111010001010011000"
)
"""The authors' 24-layer network: per layer its operation's code, then a bit for each earlier layer but the last."""


def published():
    """(operation, layers read beside) of each layer."""
    groups = PUBLISHED.split()
    assert [len(group) for group in groups] == list(range(1, 25))
    return [(OPS[int(group[0])], [i for i, bit in enumerate(group[1:]) if bit == "1"]) for group in groups]


def images(batch=4, side=8, seed=0):
    return torch.randn(batch, 3, side, side, generator=generator(seed, "images"), dtype=torch.float64)


def network(*layers):
    """A genotype from (operation, skips) pairs."""
    choices = {}
    for number, (op, skips) in enumerate(layers, start=1):
        choices[f"layer_{number}.op"] = op
        if number > 1:
            choices[f"layer_{number}.skips"] = skips
    return Genotype("enas-macro", choices)


def supernet(space, width=4, seed=0):
    net = space.supernet(width)
    net.initialise(generator(seed, "init"), 0.0)
    return net.double()


# ------------------------------------------------------------------------------------------------ choices and counts


@pytest.mark.parametrize("layers, n_ops", [(1, 6), (2, 6), (3, 2), (4, 2)])
def test_size_by_formula_and_by_counting(layers, n_ops):
    """K^L 2^(L (L - 1) / 2) different networks."""
    space = ConvMacro(layers=layers, operations=OPS[:n_ops])
    size = n_ops**layers * 2 ** (layers * (layers - 1) // 2)
    bits = [[[j for j in range(n) if row[j]] for row in itertools.product((0, 1), repeat=n)] for n in range(layers)]
    found = set()
    for ops in itertools.product(OPS[:n_ops], repeat=layers):
        for skips in itertools.product(*bits):
            genotype = network(*zip(ops, skips, strict=True))
            space.check(genotype)
            found.add(genotype.id)
    assert len(found) == size == space.decisions.size()


def test_size_of_the_papers_space():
    assert ConvMacro().decisions.size() == 6**12 * 2**66
    assert f"{ConvMacro().decisions.size():.1e}" == "1.6e+29"


def test_the_published_network_is_shipped():
    genotype = load_genotype("enas-macro")
    assert genotype == network(*published())
    covering_space(genotype).check(genotype)
    n_bits, n_set = 24 * 23 / 2, sum(len(skips) for _, skips in published())
    assert n_set / n_bits == pytest.approx(0.355, abs=5e-4)


def parameters_by_hand(layers, width, dense, growth=2):
    """Weights of the stem, of each layer's two convolutions and its join, of the reductions; two for each channel of a
    batch norm."""
    total, c = 27 * width + 2 * width, width
    read = [set(skips) for _, skips in layers]
    for number, (op, skips) in enumerate(layers, start=1):
        total += c * c + 2 * c
        if "conv" in op:
            area = int(op[-1]) ** 2
            total += (area * c * c if dense or not op.startswith("sep") else area * c + c * c) + 2 * c
        if number > 1:
            total += (len(skips) + 1) * c * c + 2 * c
        if number in (len(layers) // 3, 2 * len(layers) // 3):
            n_read = len({j for later in read[number:] for j in later if j < number}) + 1
            total += n_read * (c * growth * c + 2 * growth * c)
            c *= growth
    return total, c


@pytest.mark.parametrize("dense, expected", [(True, 42_559_392), (False, 30_947_424)])
def test_parameters_of_the_published_network(dense, expected):
    """42.6 M as the authors built it, 30.9 M with true separable convolutions: 96 channels, a classifier of 384 x 10
    without bias; every one of the 9 + 17 earlier layers is read behind the reductions."""
    by_hand, channels = parameters_by_hand(published(), 96, dense)
    assert by_hand + 10 * channels == expected
    with torch.device("meta"):
        body = ConvMacro(layers=24, separable=not dense).build(load_genotype("enas-macro"), 96)
    assert sum(p.numel() for p in body.parameters()) == by_hand and body.n_features == channels == 384
    assert len(body.reductions) == 9 + 17


@pytest.mark.parametrize("dense", [True, False])
def test_parameters_with_pools_and_unread_layers(dense):
    space = ConvMacro(layers=7, separable=not dense)
    for seed in range(5):
        genotype = space.sample(random.Random(seed))
        layers = [
            (genotype.choices[f"layer_{i}.op"], genotype.choices.get(f"layer_{i}.skips", [])) for i in range(1, 8)
        ]
        body = space.build(genotype, 6)
        assert sum(p.numel() for p in body.parameters()) == parameters_by_hand(layers, 6, dense)[0]


def multiply_adds_by_hand(layers, width, side, dense):
    total, c, s = 27 * width * side**2, width, side
    for number, (op, skips) in enumerate(layers, start=1):
        each = c * c + ((len(skips) + 1) * c * c if number > 1 else 0)
        if "conv" in op:
            area = int(op[-1]) ** 2
            each += area * c * c if dense or not op.startswith("sep") else area * c + c * c
        total += each * s * s
        if number in (len(layers) // 3, 2 * len(layers) // 3):
            n_read = len({j for _, later in layers[number:] for j in later if j < number}) + 1
            s //= 2
            total += n_read * c * 2 * c * s * s
            c *= 2
    return total


@pytest.mark.parametrize("dense", [True, False])
def test_multiply_adds(dense):
    """Against PyTorch's counter, which counts each multiply-add twice: the published network, and one with pools."""
    small = [("max_pool_3x3", []), ("sep_conv_5x5", [0]), ("conv_3x3", []), ("avg_pool_3x3", [0, 2])]
    for layers, width, side in ((published(), 96, 32), (small, 6, 8)):
        with torch.device("meta"):
            body = ConvMacro(layers=len(layers), separable=not dense).build(network(*layers), width)
            with FlopCounterMode(display=False) as counter:
                body(torch.zeros(1, 3, side, side), None, {})
        assert counter.get_total_flops() == 2 * multiply_adds_by_hand(layers, width, side, dense)


# ---------------------------------------------------------------------------------------------------------- networks


def by_hand(state, layers, x, reductions, running=None):
    """The network written out from its weights: batch norm by batch statistics, everything read through loops."""

    def norm(x, name):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        scale, shift = (state[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def conv_norm(x, name, groups=1, norm_name=None):
        weight = state[f"{name}.weight"]
        y = F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
        return y if norm_name is None else norm(y, norm_name)

    tensors = [conv_norm(x, "stem.conv", 1, "stem.norm")]
    for number, (op, skips) in enumerate(layers):
        at = f"layers.{number}"
        y = conv_norm(tensors[-1].relu(), f"{at}.ops.{op}.0.conv", 1, f"{at}.ops.{op}.0.norm").relu()
        if op == "max_pool_3x3":
            y = F.pad(y, (1, 1, 1, 1), value=float("-inf")).unfold(2, 3, 1).unfold(3, 3, 1).amax((4, 5))
        elif op == "avg_pool_3x3":
            total, inside = (
                F.pad(t, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1).sum((4, 5)) for t in (y, torch.ones_like(y))
            )
            y = total / inside
        elif f"{at}.ops.{op}.1.depthwise.weight" in state:
            y = conv_norm(y, f"{at}.ops.{op}.1.depthwise", y.shape[1])
            y = conv_norm(y, f"{at}.ops.{op}.1.pointwise", 1, f"{at}.ops.{op}.1.norm")
        else:
            y = conv_norm(y, f"{at}.ops.{op}.1.conv", 1, f"{at}.ops.{op}.1.norm")
        if number > 0:
            joined = torch.cat([*(tensors[j] for j in skips), y], dim=1).relu()
            y = conv_norm(joined, f"{at}.join.conv", 1, f"{at}.join.norm")
        tensors.append(y)
        if number + 1 in reductions:
            for source, tensor in enumerate(tensors):
                name = f"reductions.after_{number + 1}_of_{source}"
                if f"{name}.even.weight" in state:
                    halves = (
                        F.conv2d(tensor[:, :, ::2, ::2], state[f"{name}.even.weight"]),
                        F.conv2d(tensor[:, :, 1::2, 1::2], state[f"{name}.odd.weight"]),
                    )
                    tensors[source] = norm(torch.cat(halves, dim=1), f"{name}.norm")
    return tensors[-1].mean((2, 3))


EVERY_OP = [
    ("conv_3x3", []),
    ("sep_conv_5x5", [0]),
    ("avg_pool_3x3", [1]),
    ("max_pool_3x3", []),
    ("sep_conv_3x3", [0, 2]),
    ("conv_5x5", [1, 3, 4]),
]


@pytest.mark.parametrize("separable", [True, False])
def test_a_network_written_out(separable):
    """All six operations, skips over none, one and both reductions."""
    body = ConvMacro(layers=6, separable=separable).build(network(*EVERY_OP), 4).double()
    body.initialise(generator(0, "init"), 0.0)
    with torch.no_grad():
        for parameter in body.parameters():  # batch norms that do something
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(1, "noise"), dtype=torch.float64)
    expected = by_hand(body.state_dict(), EVERY_OP, images(), (2, 4))
    features, state = body(images(), None, {})
    assert state is None and features.shape == (4, body.n_features) == (4, 16)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("settings", [{"layers": 4}, {"layers": 5, "separable": False, "growth": 1}, {"layers": 2}])
def test_a_path_of_the_supernet_is_the_stand_alone_network(settings):
    """In training mode, batch norm by batch statistics on both sides: outputs, the map of an auxiliary head, and every
    gradient; with drop-path as well."""
    space = ConvMacro(**settings)
    net = supernet(space)
    for seed in range(6):
        genotype = space.sample(random.Random(seed))
        body = space.build(genotype, 4).double().train()
        body.load_state_dict(net.inherit(genotype))
        for rate in (0.0, 0.5):
            masks = body.draw_masks(4, {"path": rate}, generator(seed, "masks"))
            assert bool(masks) == (rate > 0 and any(genotype.choices.get(f"layer_{i}.skips") for i in range(2, 6)))
            found, expected = net.maps(images(), masks, genotype), body.maps(images(), masks)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert expected[1].shape[1] == body.auxiliary_channels
        net.zero_grad()
        net(images(), None, {}, genotype)[0].square().sum().backward()
        body.zero_grad()
        body(images(), None, {})[0].square().sum().backward()
        gradients = dict(net.named_parameters())
        for name, parameter in body.named_parameters():
            if name.endswith("join.conv.weight"):
                layer = net.layers[int(name.split(".")[1])]
                ours = gradients[name].grad[:, layer.columns(body.layers[int(name.split(".")[1])].step.sources)]
            else:
                ours = gradients[name].grad
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-12)


def mixture_of(space, genotype):
    """The one-hot mixture that is `genotype`."""
    tables = {t.name: torch.zeros(len(t.edges), len(t.ops), dtype=torch.float64) for t in space.tables()}
    for row in range(space.layers):
        tables["ops"][row, space.operations.index(genotype.choices[f"layer_{row + 1}.op"])] = 1.0
    for row, (layer, source) in enumerate(space.tables()[1].edges):
        tables["skips"][row, int(source in genotype.choices[f"layer_{layer}.skips"])] = 1.0
    return tables


def test_a_one_hot_mixture_is_the_path():
    space = ConvMacro(layers=5)
    net = supernet(space)
    assert [first_pair(layer) for layer in range(2, 7)] == [0, 1, 3, 6, 10]
    for seed in range(5):
        genotype = space.sample(random.Random(seed))
        mixture = mixture_of(space, genotype)
        assert space.derive(mixture) == genotype
        torch.testing.assert_close(
            net(images(), None, {}, mixture)[0], net(images(), None, {}, genotype)[0], rtol=1e-9, atol=1e-10
        )


def test_derivation_by_hand():
    space = ConvMacro(layers=3, operations=("conv_3x3", "max_pool_3x3"))
    mixture = {
        "ops": torch.tensor([[0.4, 0.6], [0.5, 0.5], [0.9, 0.1]]),
        "skips": torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.45, 0.55]]),  # layer 2 <- 0; layer 3 <- 0, 1
    }
    assert space.derive(mixture) == network(("max_pool_3x3", []), ("conv_3x3", [0]), ("conv_3x3", [1]))


def test_gradients_of_a_mixture():
    """Of every operation's weight and every skip's `on`, by finite differences; a skip's `off` adds nothing."""
    space = ConvMacro(layers=3, operations=("conv_3x3", "avg_pool_3x3", "max_pool_3x3"))
    net = supernet(space, width=2)
    weigh = torch.randn(4, net.n_features, generator=generator(0, "weigh"), dtype=torch.float64)

    def loss(ops, skips):
        return (weigh * net(images(), None, {}, {"ops": ops, "skips": skips})[0]).sum()

    tables = [torch.rand(3, k, generator=generator(k, "table"), dtype=torch.float64) for k in (3, 2)]
    leaves = [table.clone().requires_grad_() for table in tables]
    for n, gradient in enumerate(torch.autograd.grad(loss(*leaves), leaves)):
        for index in itertools.product(*map(range, gradient.shape)):
            ends = []
            for delta in (1e-6, -1e-6):
                moved = [table.clone() for table in tables]
                moved[n][index] += delta
                ends.append(loss(*moved).item())
            assert gradient[index].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)
            assert (gradient[index] == 0) == (n == 1 and index[1] == 0)


def test_running_statistics_are_of_stand_alone_networks_alone():
    """A supernet has none, so a pass leaves no trace; a stand-alone network measures them in training mode and then
    gives each image its own output in evaluation mode."""
    space = ConvMacro(layers=3)
    genotype = space.sample(random.Random(0))
    net = supernet(space)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()(images(), None, {}, genotype)
    net.train()(images(), None, {}, genotype)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())

    body = space.build(genotype, 4).double()
    body.load_state_dict(net.inherit(genotype))
    for _ in range(200):
        body.train()(images(64), None, {})
    body.eval()
    together = body(images(64), None, {})[0]
    torch.testing.assert_close(body(images(64)[7:8], None, {})[0], together[7:8])
    # the running variance is the unbiased one, over 256 values or more
    torch.testing.assert_close(together, net(images(64), None, {}, genotype)[0], rtol=0.0, atol=0.05)


def test_channels_may_grow_in_the_stand_alone_network_alone():
    """The authors' search keeps the channels, their final network doubles them."""
    space = ConvMacro(layers=3, search_growth=1)
    genotype = space.sample(random.Random(0))
    net = space.supernet(4)
    assert (net.n_features, space.build(genotype, 4).n_features) == (4, 16)
    assert net(images().float(), None, {}, genotype)[0].shape == (4, 4)
    with pytest.raises(UserError, match="cannot inherit"):
        net.inherit(genotype)


def test_reductions_are_a_setting():
    """Also of odd sides; without any, the auxiliary map is the stem's."""
    genotype = network(("conv_3x3", []), ("conv_3x3", [0]), ("conv_3x3", [0, 1]))
    for reductions, side, features in (((), 7, 4), ((2,), 4, 8), ((1, 2), 2, 16)):
        body = ConvMacro(layers=3, reductions=reductions).build(genotype, 4)
        found, auxiliary = body.maps(images(side=7).float(), {})
        assert (auxiliary.shape[-1], found.shape[1]) == (side, features)
        assert auxiliary.shape[1] == body.auxiliary_channels


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"operations": ("conv_3x3", "conv_4x4")}, "'conv_4x4' is unknown. Did you mean 'conv_"),
        ({"operations": ("conv_3x3", "conv_3x3")}, "each may stand once"),
        ({"layers": 4, "reductions": (2, 4)}, r"from 1 to 3, got \[2, 4\]"),
        ({"layers": 4, "reductions": (2, 1)}, "rising"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ConvMacro(**settings)


def test_other_networks_are_refused():
    space = ConvMacro(layers=3)
    with pytest.raises(UserError, match=r"layer_2.skips: 1 is not one of 0"):
        space.check(network(("conv_3x3", []), ("conv_3x3", [1]), ("conv_3x3", [])))
    with pytest.raises(UserError, match=r"'layer_3.op' is missing"):
        space.check(network(("conv_3x3", []), ("conv_3x3", [0])))


def test_a_diagram_shows_skips_and_reductions():
    diagram = ConvMacro(layers=4).diagram(network(*EVERY_OP[:4]))
    labels = {key: label for key, label, _ in diagram.nodes}
    assert labels["1"] == "1: conv 3x3\nthen half the size" and labels["2"].startswith("2: sep conv 5x5\nthen")
    pairs = {(source, target) for source, target, _ in diagram.edges}
    assert pairs == {
        ("image", "0"), ("0", "1"), ("1", "2"), ("0", "2"), ("2", "3"), ("1", "3"), ("3", "4"), ("4", "out")
    }  # fmt: skip

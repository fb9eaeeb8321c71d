"""Convolutional cells: published networks counted by hand, supernet against stand-alone, derivation by hand."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lmnas.core.contracts import LearnStep
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator, rng
from lmnas.methods.strategies.gradient import architecture_gradient
from lmnas.nn.train import n_parameters
from lmnas.runs.build import covering_space
from lmnas.spaces.conv.cells import DARTS_OPERATIONS, ENAS_OPERATIONS, DartsConv, EnasMicro
from lmnas.spaces.conv.network import CellProgram, edges, first_edge, loose_ends

B, C, S = 3, 4, 8
SPACES = {"darts": DartsConv(cells=4, pool_norm="always"), "enas": EnasMicro(cells=5)}
both = pytest.mark.parametrize("name", SPACES)


def images(size=S, dtype=torch.float64):
    return torch.randn(B, 3, size, size, generator=generator(0, "images"), dtype=dtype)


def supernet_of(space, width=C):
    net = space.supernet(width)
    net.initialise(generator(1, "weights"), 0.0)
    return net.double()


# ------------------------------------------------------------------------------------------------ published networks

# cells as the authors' code writes them, for the sums by hand
DARTS_CELLS = {
    "darts-conv-v1": (
        "s3 1,s3 0 | sk 0,s3 1 | sk 0,s3 1 | s3 0,sk 2",
        "mp 0,mp 1 | sk 2,mp 0 | mp 0,sk 2 | sk 2,ap 0",
    ),
    "darts-conv-v2": (
        "s3 0,s3 1 | s3 0,s3 1 | s3 1,sk 0 | sk 0,d3 2",
        "mp 0,mp 1 | sk 2,mp 1 | mp 0,sk 2 | sk 2,mp 1",
    ),
}
ENAS_CELLS = ("0 2 0 0 0 4 0 1 0 4 1 1 1 0 0 1 0 2 1 1", "1 0 1 0 0 3 0 2 1 1 3 1 1 0 0 4 0 3 1 1")


class Ledger:
    """Weights and multiply-adds of convolutions (batch norms: weights only)."""

    def __init__(self):
        self.weights = self.multiply_adds = 0

    def convolution(self, n_weights, pixels, channels=0):
        """`channels` of batch norm behind it have a scale and a shift each."""
        self.weights += n_weights + 2 * channels
        self.multiply_adds += n_weights * pixels

    def separable(self, c, kernel, pixels, times=2):
        for _ in range(times):
            self.convolution(kernel**2 * c, pixels)
            self.convolution(c * c, pixels, c)


def darts_by_hand(normal, reduce, c, n_cells):
    ledger, pixels = Ledger(), 32 * 32
    ledger.convolution(3 * 9 * 3 * c, pixels, 3 * c)
    before, last = 3 * c, 3 * c
    before_pixels = pixels
    for i in range(n_cells):
        is_reduction = i in (n_cells // 3, 2 * n_cells // 3)
        c *= 2 if is_reduction else 1
        # a factorised reduction is c/2 x 2 columns at a quarter of the pixels: the larger input comes to `pixels`
        ledger.convolution(before * c, pixels, c)
        ledger.convolution(last * c, pixels, c)
        inside = pixels // 4 if is_reduction else pixels
        for node in (reduce if is_reduction else normal).split("|"):
            for edge in node.split(","):
                op, source = edge.split()
                halves = is_reduction and int(source) < 2
                if op == "s3":
                    ledger.separable(c, 3, inside)
                elif op == "d3":
                    ledger.separable(c, 3, inside, times=1)
                elif op == "sk" and halves:
                    ledger.convolution(c * c, inside, c)
        before, last = last, 4 * c
        before_pixels, pixels = pixels, inside
    assert before_pixels == pixels == 64
    return ledger, last


def enas_by_hand(normal, reduce, c, n_layers):
    ledger, pixels = Ledger(), 32 * 32
    ledger.convolution(3 * 9 * 3 * c, pixels, 3 * c)
    before, last = 3 * c, 3 * c
    for i in range(n_layers + 2):
        is_reduction = i in (n_layers // 3, 2 * (n_layers // 3) + 1)
        c *= 2 if is_reduction else 1
        ledger.convolution(before * c, pixels, c)
        ledger.convolution(last * c, pixels, c)
        ledger.convolution(c * c, pixels, c)  # ENAS' second 1x1 on the last cell's output
        inside = pixels // 4 if is_reduction else pixels
        tokens = list(map(int, (reduce if is_reduction else normal).split()))
        for source, op in zip(tokens[::2], tokens[1::2], strict=True):
            if op in (0, 1):
                ledger.separable(c, (3, 5)[op], inside)
            elif op == 4 and is_reduction and source < 2:
                ledger.convolution(c * c, inside, c)
        loose = {2, 3, 4, 5, 6} - set(tokens[::2])
        before, last, pixels = last, len(loose) * c, inside
    return ledger, last


def counted(name, width=36):
    """Parameters and multiply-adds of a shipped network on one image of 32 x 32, at the published depth."""
    genotype = load_genotype(name)
    with torch.device("meta"):
        body = covering_space(genotype).build(genotype, width)
        with FlopCounterMode(display=False) as counter:
            body(torch.empty(1, 3, 32, 32), None, {})
    return n_parameters(body), counter.get_total_flops() // 2, body


@pytest.mark.parametrize("name, published", [("darts-conv-v1", 3_169_414), ("darts-conv-v2", 3_349_342)])
def test_parameters_and_multiply_adds_of_darts(name, published):
    """Liu et al., table 1: 3.3 M for V2; V1 by the same sum. With a classifier for ten classes."""
    ledger, features = darts_by_hand(*DARTS_CELLS[name], 36, 20)
    assert ledger.weights + 10 * features + 10 == published
    parameters, multiply_adds, body = counted(name)
    assert body.n_features == features == 4 * 4 * 36 and body.auxiliary_channels == features
    assert parameters == ledger.weights and multiply_adds == ledger.multiply_adds


def test_parameters_and_multiply_adds_of_enas_micro():
    """3.9 M without auxiliary head: 15 + 2 cells of 36 filters, a classifier without bias as in the authors' code."""
    ledger, features = enas_by_hand(*ENAS_CELLS, 36, 15)
    assert ledger.weights + 10 * features == 3_894_372
    parameters, multiply_adds, body = counted("enas-micro")
    assert body.n_features == features == 5 * 4 * 36
    assert parameters == ledger.weights and multiply_adds == ledger.multiply_adds


def test_published_cells_are_what_the_papers_print():
    short = dict(zip(("mp", "ap", "sk", "s3", "s5", "d3", "d5"), DARTS_OPERATIONS, strict=True))
    for name, texts in DARTS_CELLS.items():
        programs = covering_space(load_genotype(name)).programs(load_genotype(name))
        for program, text in zip(programs.values(), texts, strict=True):
            for node, edge_texts in zip(program.nodes, text.split("|"), strict=True):
                wanted = {(int(e.split()[1]), short[e.split()[0]]) for e in edge_texts.split(",")}
                assert set(node) == wanted and len(wanted) == 2
            assert program.outputs == (2, 3, 4, 5)
    genotype = load_genotype("enas-micro")
    programs = covering_space(genotype).programs(genotype)
    for program, text in zip(programs.values(), ENAS_CELLS, strict=True):
        tokens = [
            token for node in program.nodes for source, op in node for token in (source, ENAS_OPERATIONS.index(op))
        ]
        assert " ".join(map(str, tokens)) == text
    assert (programs["normal"].outputs, programs["reduce"].outputs) == ((2, 3, 4, 5, 6), (2, 4, 5, 6))


def test_the_network_around_the_cells():
    """Reductions at the published positions; an auxiliary head reads 8 x 8 pixels."""
    for name, positions, auxiliary in (("darts-conv-v2", [6, 13], 13), ("enas-micro", [5, 11], 12)):
        genotype = load_genotype(name)
        with torch.device("meta"):
            body = covering_space(genotype).build(genotype, 36)
            features, image = body.maps(torch.empty(2, 3, 32, 32), {})
        assert [i for i, cell in enumerate(body.cells) if cell.place.kind == "reduce"] == positions
        assert body.layout.auxiliary == auxiliary
        assert features.shape == (2, body.n_features) and image.shape == (2, body.auxiliary_channels, 8, 8)


# ------------------------------------------------------------------------------------------------------------- sizes


def everything(space):
    """Every genotype, by trying all combinations of all options."""

    def values(decision):
        size = getattr(decision, "size", None)
        return map(list, itertools.combinations(decision.options, size)) if size else decision.options

    for combination in itertools.product(*map(values, space.decisions)):
        genotype = Genotype(space.name, {d.name: value for d, value in zip(space.decisions, combination, strict=True)})
        space.check(genotype)
        yield genotype


def test_sizes_by_formula():
    """DARTS: C(n, 2) pairs of inputs and 7^2 operations a node, in both cells (the paper: about 10^9 a cell). ENAS: n^2
    5^2 sequences a node."""
    cell = math.prod(math.comb(n, 2) * 7**2 for n in range(2, 6))
    assert cell == 1_037_664_180 and DartsConv().decisions.size() == cell**2
    cell = math.prod(n**2 * 5**2 for n in range(2, 7))
    assert EnasMicro().decisions.size() == cell**2 == pytest.approx(2.6e25, rel=0.02)


def test_sizes_by_counting():
    """Two nodes, two operations: DARTS has no two genotypes for one network; ENAS' halves may change places."""
    darts = DartsConv(n_nodes=2, operations=("sep_conv_3x3", "skip_connect"))
    genotypes = list(everything(darts))
    assert len(genotypes) == darts.decisions.size() == (1 * 4 * 3 * 4) ** 2
    networks = {tuple(frozenset(node) for p in darts.programs(g).values() for node in p.nodes) for g in genotypes}
    assert len({g.id for g in genotypes}) == len(networks) == len(genotypes)

    enas = EnasMicro(n_nodes=1, operations=("sep_conv_3x3", "identity"))
    genotypes = list(everything(enas))
    assert len(genotypes) == enas.decisions.size() == (2 * 2) ** 4
    halves = {tuple(tuple(sorted(p.nodes[0])) for p in enas.programs(g).values()) for g in genotypes}
    assert len(halves) == (4 * 5 // 2) ** 2  # unordered pairs of four (input, operation)


# ------------------------------------------------------------------------------------------- stand-alone and supernet


@both
def test_stand_alone_equals_path_of_supernet(name):
    """The central test, in training mode (batch statistics): features, map, gradients, and no trace in the supernet."""
    space = SPACES[name]
    net = supernet_of(space)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert not any("running" in key for key in before)
    shipped = {"darts": ["darts-conv-v1", "darts-conv-v2"], "enas": ["enas-micro"]}[name]
    for genotype in [*map(load_genotype, shipped), *(space.sample(rng(2, name, k)) for k in range(6))]:
        body = space.build(genotype, C).double().train()
        body.load_state_dict(net.inherit(genotype))
        masks = body.draw_masks(B, {"path": 0.4}, generator(3, "masks"))
        alone, alone_map = body.maps(images(), masks)
        path, path_map = net.maps(images(), masks, genotype)
        assert torch.equal(alone, path[:, net.columns(genotype)]) and path.shape == (B, net.n_features)
        assert torch.equal(alone_map, path_map[:, path_map.abs().sum((0, 2, 3)) > 0])
        found = torch.autograd.grad(path.square().sum(), net.stem.conv.weight)[0]
        torch.testing.assert_close(torch.autograd.grad(alone.square().sum(), body.stem.conv.weight)[0], found)
        assert not torch.equal(alone, body.eval().maps(images(), masks)[0])
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@both
def test_paths_differ(name):
    """The test above could not fail if every path gave the same."""
    net = supernet_of(SPACES[name])
    found = {net(images(), None, {}, SPACES[name].sample(rng(0, k)))[0].square().sum().item() for k in range(8)}
    assert len(found) == 8


@both
def test_a_path_runs_its_own_operations_alone(name):
    space = SPACES[name]
    net, called = supernet_of(space), []
    for cell in net.cells:
        for operation in cell.ops:
            operation.register_forward_hook(lambda *_, cell=cell: called.append(cell))
    net(images(), None, {}, space.sample(rng(4)))[0].sum().backward()
    assert len(called) == len(net.cells) * space.n_nodes * 2
    idle = [w for cell in net.cells for w in cell.ops.parameters() if w.grad is None]
    assert len(idle) > 0.5 * sum(1 for cell in net.cells for _ in cell.ops.parameters())


def test_mixture_against_a_loop_over_operations():
    """A node is the sum of all weighted operations on all earlier nodes, `none` adding nothing (eq. 2)."""
    space = DartsConv(cells=3, n_nodes=2)
    net = supernet_of(space)
    cell = net.cells[0]
    table = torch.rand(5, 8, generator=generator(5), dtype=torch.float64).softmax(-1)
    first = second = (net.stem(images()), None)
    states = [cell.inputs.first(first[0]), cell.inputs.second(second[0])]
    for node, rows in ((2, (0, 1)), (3, (2, 3, 4))):
        terms = []
        for source, row in enumerate(rows):
            assert space.tables()[0].edges[row] == (node, source)
            for k, name in enumerate(DARTS_OPERATIONS):
                terms.append(table[row, 1 + k] * cell.ops[7 * row + k](states[source]))
                assert space.tables()[0].ops[1 + k] == name
        states.append(torch.stack(terms).sum(0))
    torch.testing.assert_close(cell(first, second, None, table)[0], torch.cat(states[2:], 1))


def test_second_order_gradient_against_finite_differences():
    """d/d alpha of L_val(w - xi (dL_train/dw + decay w), alpha) in a tiny supernet under the mean square. Steps are
    short: between their ends no ReLU may change sides."""
    space = DartsConv(cells=3, n_nodes=1, operations=("avg_pool_3x3", "skip_connect", "sep_conv_3x3"))
    net = supernet_of(space, width=2)
    data = {s: torch.randn(4, 3, S, S, generator=generator(6, s), dtype=torch.float64) for s in ("train", "valid")}
    target = torch.randn(4, net.n_features, generator=generator(7), dtype=torch.float64)
    noise = generator(8)
    alphas = {
        t.name: torch.randn(len(t.edges), len(t.ops), generator=noise, dtype=torch.float64).requires_grad_()
        for t in space.tables()
    }

    def loss(split):
        def compute(weights, mixture):
            features, _ = torch.func.functional_call(net, dict(weights), (data[split], None, {}, mixture))
            return (features - target).square().mean()

        return compute

    def relax(logits):
        return {name: a.softmax(-1) for name, a in logits.items()}

    weights = {name: w.detach() for name, w in net.named_parameters()}
    xi, decay = 0.5, 0.01
    step = LearnStep(
        step=0,
        train_loss=loss("train"),
        valid_loss=loss("valid"),
        weights=weights,
        learning_rate=xi,
        weight_decay=decay,
        clip=None,
    )

    def unrolled(logits):
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        gradients = torch.autograd.grad(loss("train")(leaves, relax(logits)), list(leaves.values()))
        ahead = {n: w - xi * (g + decay * w) for (n, w), g in zip(weights.items(), gradients, strict=True)}
        return loss("valid")(ahead, relax(logits)).item()

    second, first = (architecture_gradient(step, alphas, relax, order, epsilon=1e-7) for order in (2, 1))
    flat = {name: a.detach().clone() for name, a in alphas.items()}
    for name, row, column in (("normal", 0, 0), ("normal", 1, 3), ("reduce", 0, 2), ("reduce", 1, 1)):
        ends = []
        for sign in (1, -1):
            moved = {key: a.clone() for key, a in flat.items()}
            moved[name][row, column] += sign * 1e-6
            ends.append(unrolled(moved))
        expected = (ends[0] - ends[1]) / 2e-6
        assert second[name][row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)
        assert first[name][row, column].item() != pytest.approx(expected, rel=1e-2)


# -------------------------------------------------------------------------------------------------------- derivation


def test_derivation_of_darts_by_hand():
    """Per node the two strongest edges by their largest weight that is not `none`, then that operation (k = 2)."""
    space = DartsConv(n_nodes=2, operations=("max_pool_3x3", "skip_connect"))
    table = torch.tensor(
        [
            # none, max_pool, skip
            [0.98, 0.01, 0.01],  # (2, 0): the node has two edges, so both stay; the earlier operation wins the tie
            [0.20, 0.30, 0.50],  # (2, 1)
            [0.90, 0.04, 0.06],  # (3, 0): 0.06
            [0.40, 0.50, 0.10],  # (3, 1): 0.50
            [0.80, 0.06, 0.14],  # (3, 2): 0.14
        ]
    )
    flipped = table.clone()
    flipped[2, 2] = 0.14  # as strong as (3, 2): the earlier edge wins
    choices = space.derive({"normal": table, "reduce": flipped}).choices
    expected = {
        "node_2.inputs": [0, 1],
        "node_2.op_1": "max_pool_3x3",
        "node_2.op_2": "skip_connect",
        "node_3.inputs": [1, 2],
        "node_3.op_1": "max_pool_3x3",
        "node_3.op_2": "skip_connect",
    }
    for name, value in expected.items():
        assert choices[f"normal.{name}"] == value
    assert choices["reduce.node_3.inputs"] == [0, 1]
    assert (choices["reduce.node_3.op_1"], choices["reduce.node_3.op_2"]) == ("skip_connect", "max_pool_3x3")


def test_derivation_of_enas_by_hand():
    space = EnasMicro(n_nodes=2, operations=("avg_pool_3x3", "identity"))
    table = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])
    genotype = space.derive({"normal": table, "reduce": table.flip(1)})
    programs = space.programs(genotype)
    assert programs["normal"].nodes == (
        ((0, "avg_pool_3x3"), (1, "identity")),
        ((0, "avg_pool_3x3"), (2, "identity")),
    )
    assert programs["normal"].outputs == (3,)
    assert programs["reduce"].nodes[1] == ((0, "identity"), (2, "avg_pool_3x3"))


def test_loose_ends_in_a_mixture():
    """Of three nodes, the second reads the first by one of its three equal edges: two of three; the third by one half
    of its mass, which is certain, and the second by a quarter."""
    mass = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    found = torch.stack(loose_ends(mass, 3))
    torch.testing.assert_close(found, torch.tensor([(1 - 2 / 3) * 0.0, 0.5, 1.0], dtype=torch.float64))
    assert edges(3) == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert [first_edge(i) for i in range(4)] == [0, 2, 5, 9]


def test_what_nobody_reads():
    """An input that no node reads has no weights; a node that is read is no output."""
    choices = {}
    for kind in ("normal", "reduce"):
        for node, inputs in ((2, (1, 1)), (3, (1, 2))):
            for slot in (1, 2):
                choices[f"{kind}.node_{node}.input_{slot}"] = inputs[slot - 1]
                choices[f"{kind}.node_{node}.op_{slot}"] = "sep_conv_3x3"
    space = EnasMicro(n_nodes=2, cells=4)
    genotype = Genotype(space.name, choices)
    assert space.programs(genotype)["normal"] == CellProgram(
        (((1, "sep_conv_3x3"), (1, "sep_conv_3x3")), ((1, "sep_conv_3x3"), (2, "sep_conv_3x3"))), (3,)
    )
    body = space.build(genotype, C)
    assert not any("inputs.first" in key for key in body.state_dict())
    body.initialise(generator(0), 0.0)
    body(images(dtype=torch.float32), None, {})[0].sum().backward()
    assert all(weight.grad is not None for weight in body.parameters())
    labels = [label for _, label, _ in space.diagram(genotype).nodes]
    assert not any("c[k-2]" in label for label in labels)


# --------------------------------------------------------------------------------------------------- drop-path, norms


@both
def test_drop_path_takes_whole_images_and_never_an_identity(name):
    space = SPACES[name]
    operation = {"darts": "skip_connect", "enas": "identity"}[name]
    choices = {
        d.name: operation if ".op_" in d.name else [0, 1] if d.name.endswith("inputs") else 1 for d in space.decisions
    }
    body = space.build(Genotype(space.name, choices), C).double()
    body.initialise(generator(0), 0.0)
    masks = body.draw_masks(64, {"path": 0.5}, generator(1))
    shares = [(mask == 0).double().mean().item() for mask in masks.values()]
    grown = [(i + 1) / len(shares) if name == "enas" else 1.0 for i in range(len(shares))]
    assert shares == pytest.approx([0.5 * g for g in grown], abs=0.06)  # 512 or 640 draws each
    assert {tuple(mask.shape) for mask in masks.values()} == {(space.n_nodes, 2, 64, 1, 1, 1)}
    nothing = {key: torch.zeros_like(mask[:, :, :B]) for key, mask in masks.items()}
    plain = body(images(), None, {})[0]
    normal = {key: mask for i, (key, mask) in enumerate(nothing.items()) if body.layout.kind(i) == "normal"}
    assert torch.equal(body(images(), None, normal)[0], plain)
    assert not torch.equal(body(images(), None, nothing)[0], plain)  # the reducing ones are no identities
    assert body.draw_masks(B, {"path": 0.0, "hidden": 0.5}, generator(1)) == {}


def test_norms_of_search_and_retraining():
    """Supernets keep no running statistics and, in DARTS' cells, learn no scale; the stand-alone body does both."""
    for space in (DartsConv(cells=3), EnasMicro(cells=3)):
        net, body = space.supernet(C), space.build(space.sample(rng(0)), C)
        for network, alone in ((net, False), (body, True)):
            for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
                assert norm.track_running_stats == alone
                assert norm.affine == (alone or space.name == "enas-micro" or norm is net.stem.norm)
    for pool_norm, counts in (("search", (True, False)), ("always", (True, True)), ("never", (False, False))):
        space = DartsConv(cells=3, operations=("max_pool_3x3",), pool_norm=pool_norm)
        networks = space.supernet(C), space.build(space.sample(rng(0)), C)
        found = [any(isinstance(op.norm, nn.BatchNorm2d) for op in network.cells[0].ops) for network in networks]
        assert tuple(found) == counts


# ------------------------------------------------------------------------------------------------------------ errors


def test_what_is_refused():
    with pytest.raises(UserError, match=r"operation 'sep_conv_3x4' is unknown\. Did you mean 'sep_conv_3x3'"):
        DartsConv(operations=("sep_conv_3x4",))
    with pytest.raises(UserError, match="each may stand once"):
        EnasMicro(operations=("identity", "identity"))
    space = DartsConv(cells=4, search_cells=3)
    genotype = load_genotype("darts-conv-v2")
    with pytest.raises(UserError, match="where the space's cells and search_cells are the same"):
        space.supernet(2).inherit(genotype)
    with pytest.raises(UserError, match="is of space 'darts-conv', expected 'enas-micro'"):
        EnasMicro().check(genotype)
    wrong = Genotype("darts-conv", {**genotype.choices, "normal.node_3.inputs": [1]})
    with pytest.raises(UserError, match=r"normal\.node_3\.inputs: \[1\] must name 2 of 0, 1, 2"):
        covering_space(wrong)
    with pytest.raises(ValueError, match="a supernet needs a choice"):
        space.supernet(2)(images(dtype=torch.float32), None, {})

"""The fused recurrent cell equals the reference, values and all gradients, and falls back where it must."""

import copy

import pytest
import torch

from lmnas.core.contracts import LearnStep
from lmnas.core.errors import UserError
from lmnas.core.events import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.core.registry import component
from lmnas.core.seeds import generator, rng
from lmnas.methods.estimators.shared import Shared
from lmnas.methods.strategies.gradient import Gradient, architecture_gradient
from lmnas.nn.kernels import Program, decide, dispatch, edges, fused, reference, set_kernel
from lmnas.nn.ops.dropout import draw_mask
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.runs.build import covering_space
from lmnas.spaces.recurrent.cell import RecurrentCell

BATCH_NORMS = ("none", "nodes", "output")
MASKS = ((False, False), (True, False), (False, True), (True, True))


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        fused.load()
    except fused.Unavailable as problem:
        pytest.skip(f"no fused kernel: {problem}")


@pytest.fixture
def restored(monkeypatch):
    """The choice of kernel as it was, after the test."""
    monkeypatch.setattr(dispatch, "_used", dispatch._used)


class Problem:
    """Random arguments of a cell with `n` nodes after node 0; a program where `space` gives one, else a mixture."""

    def __init__(self, t, b, h, n, *, seed, masks=(False, False), sharing="node", program=None, dtype=torch.float64):
        noise = generator(seed, "problem")

        def random(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=noise, dtype=torch.float64)).to(dtype).requires_grad_()

        scale = h**-0.5
        self.inputs, self.state = random(t, b, h), random(b, h)
        self.w_input = random(2 * h, 2 * h, scale=scale)
        count = n if program is not None or sharing == "node" else len(edges(n))
        self.w_nodes = [random(h, 2 * h, scale=scale) for _ in range(count)]
        self.masks = [draw_mask((b, h), 0.4, noise, self.inputs) if mask else None for mask in masks]
        self.program = program
        self.mixture = []
        if program is None:
            # the fifth column is `none`, whose mass is missing from the rows
            rows = [random(5).detach().softmax(0)[:4], random(len(edges(n)), 5).detach().softmax(1)[:, :4]]
            self.mixture = [p.clone().requires_grad_() for p in (*rows, random(n + 1).detach().softmax(0))]
        self.gradient = random(t, b, h).detach()

    @property
    def leaves(self):
        return [self.inputs, self.state, self.w_input, *self.w_nodes, *self.mixture]

    def run(self, kernel, batch_norm):
        weights = (self.inputs, self.state, self.w_input, self.w_nodes)
        if self.program is not None:
            return kernel.recurrent_path(*weights, self.program, *self.masks, batch_norm)
        return kernel.recurrent_mixture(*weights, *self.mixture, *self.masks, batch_norm)

    def gradients(self, kernel, batch_norm):
        hs = self.run(kernel, batch_norm)
        gradients = torch.autograd.grad(hs, self.leaves, self.gradient, allow_unused=True)
        return hs, [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, self.leaves, strict=True)]

    def doubled(self):
        """The same problem in float64."""
        twin = copy.copy(self)
        for name in ("inputs", "state", "w_input", "gradient"):
            setattr(twin, name, getattr(self, name).detach().double().requires_grad_())
        for name in ("w_nodes", "mixture"):
            setattr(twin, name, [v.detach().double().requires_grad_() for v in getattr(self, name)])
        twin.masks = [None if mask is None else mask.double() for mask in self.masks]
        return twin


def error(ours, plain):
    """The largest difference, relative to the largest value."""
    return ((ours - plain).abs().max() / plain.abs().max().clamp_min(torch.finfo(plain.dtype).tiny)).item()


def assert_equal(problem, batch_norm):
    """To 1e-10 in float64. In float32 to 1e-5, or to three times the reference's own distance from float64: a few
    problems are so sensitive to rounding that two correct programs differ by more.
    """
    hs, gradients = problem.gradients(fused, batch_norm)
    plain_hs, plain_gradients = problem.gradients(reference, batch_norm)
    ours, plain = [hs, *gradients], [plain_hs, *plain_gradients]
    tolerance = 1e-10
    if hs.dtype == torch.float32:
        exact_hs, exact_gradients = problem.doubled().gradients(reference, batch_norm)
        own = [error(a.double(), b) for a, b in zip(plain, [exact_hs, *exact_gradients], strict=True)]
        tolerance = max(1e-5, 3 * max(own))
    assert max(error(a, b) for a, b in zip(ours, plain, strict=True)) < tolerance


@pytest.mark.parametrize("output", ["all-nodes", "loose-ends"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_genotypes(dtype, output):
    """100 genotypes for each way to the output, sizes, masks and batch norms changing from one to the next."""
    for seed in range(100):
        n = (1, 2, 5, 8, 11)[seed % 5]
        space = RecurrentCell(n_nodes=n, input_activation="searched", output=output)
        problem = Problem(
            1 + seed % 4,
            (3, 4, 7)[seed % 3] if dtype == torch.float64 else (12, 16, 24)[seed % 3],
            (5, 16, 33)[seed // 2 % 3],
            n,
            seed=seed,
            masks=MASKS[seed % 4],
            program=space.program(space.sample(rng(seed, "programs"))),
            dtype=dtype,
        )
        assert_equal(problem, BATCH_NORMS[seed // 4 % 3])


@pytest.fixture
def threads():
    """Sets the number of threads; as it was after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mixture", [True, False])
def test_sizes_beyond_one_block(threads, mixture):
    """More rows, columns, depth and steps than one piece of a product holds: equal in float64 to the reference, and
    in float32 bit for bit whatever the number of threads, since pieces do not depend on it."""
    space = RecurrentCell(n_nodes=8)
    program = None if mixture else space.program(space.sample(rng(0, "programs")))
    assert_equal(Problem(4, 150, 32, 8, seed=1, masks=(True, True), program=program), "nodes" if mixture else "none")
    problem = Problem(4, 150, 32, 8, seed=2, masks=(True, True), program=program, dtype=torch.float32)
    found = []
    for count in (1, 2, 3, 4):
        threads(count)
        hs, gradients = problem.gradients(fused, "nodes")
        found.append([hs, *gradients])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("sharing", ["node", "edge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_mixtures(dtype, sharing):
    for seed in range(30):
        problem = Problem(
            1 + seed % 3,
            (3, 4, 7)[seed % 3] if dtype == torch.float64 else (12, 16, 24)[seed % 3],
            (5, 16, 33)[seed // 2 % 3],
            (1, 2, 4, 8)[seed % 4],
            seed=seed,
            masks=MASKS[seed // 2 % 4],
            sharing=sharing,
            dtype=dtype,
        )
        assert_equal(problem, BATCH_NORMS[seed // 4 % 3])


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ["path", "node", "edge"])
def test_every_mask_and_batch_norm(kind, masks, batch_norm):
    program = Program((0, 1, 2, 3, 0), (0, 1, 1, 0), (0, 3, 4)) if kind == "path" else None
    problem = Problem(3, 4, 18, 4, seed=1, masks=masks, sharing=kind, program=program)
    assert_equal(problem, batch_norm)


@pytest.mark.parametrize("t,b,batch_norm", [(1, 1, "none"), (1, 4, "nodes"), (6, 1, "none"), (2, 1, "nodes")])
def test_short_and_narrow_segments(t, b, batch_norm):
    """One step, one stream, one node, one column. Batch norm of one stream gives zeros."""
    for h in (1, 17):
        for n, program in ((1, Program((0, 2), (0,), (1,))), (1, None), (3, None)):
            assert_equal(Problem(t, b, h, n, seed=t + b, program=program), batch_norm)


@pytest.mark.parametrize("name", ["darts-v2", "darts-v1", "enas", "enas-lm"])
def test_published_cells(name):
    space = covering_space(load_genotype(name))
    program = space.program(load_genotype(name))
    problem = Problem(9, 6, 40, len(program.inputs), seed=2, masks=(True, True), program=program)
    assert_equal(problem, "none")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 12, 64])
def test_sizes_at_which_other_products_run(batch, threads):
    """One row, few and many, odd widths, columns shared out to threads."""
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float64):
            for program in (Program((0, 1, 2, 0), (0, 0, 1), (1, 2, 3)), None):
                problem = Problem(2, batch, 157, 3, seed=4, masks=(True, True), program=program, dtype=dtype)
                assert_equal(problem, "none" if batch == 1 else "nodes")
    finally:
        torch.set_num_threads(1)


def test_gradients_by_finite_differences():
    for batch_norm in BATCH_NORMS:
        problem = Problem(2, 3, 2, 2, seed=5, masks=(True, True))
        # every entry asks for one more backward through the same graph, whose tape the first has used up
        assert torch.autograd.gradcheck(lambda *_, p=problem, bn=batch_norm: p.run(fused, bn), problem.leaves)


def test_retained_graph_gives_the_same_gradients_twice():
    problem = Problem(3, 4, 6, 3, seed=1)
    hs = problem.run(fused, "nodes")
    first = torch.autograd.grad(hs, problem.leaves, problem.gradient, retain_graph=True)
    second = torch.autograd.grad(hs, problem.leaves, problem.gradient)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_graphs_do_not_share_memory():
    one, two = Problem(3, 4, 6, 3, seed=1), Problem(3, 4, 6, 3, seed=2)
    hs_one, hs_two = one.run(fused, "nodes"), two.run(fused, "nodes")
    for problem, hs in ((one, hs_one), (two, hs_two)):
        gradients = torch.autograd.grad(hs, problem.leaves, problem.gradient)
        for ours, plain in zip(gradients, problem.gradients(reference, "nodes")[1], strict=True):
            assert error(ours, plain) < 1e-10


@pytest.mark.parametrize("threads", [1, 3])
def test_runs_are_bit_equal(threads):
    """Wide enough for threads to share the work."""
    problem = Problem(3, 64, 200, 3, seed=3, masks=(True, True), dtype=torch.float32)
    torch.set_num_threads(threads)
    try:
        results = [problem.gradients(fused, "nodes") for _ in range(2)]
    finally:
        torch.set_num_threads(1)
    (hs, gradients), (again, gradients_again) = results
    assert torch.equal(hs, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again, strict=True))


def test_only_what_is_asked_for():
    """The architecture step wants no weight gradients; without any, nothing is kept."""
    problem = Problem(3, 4, 6, 3, seed=1)
    everything = dict(zip(problem.leaves, problem.gradients(reference, "nodes")[1], strict=True))
    for wanted in ([problem.mixture[1]], [problem.inputs], [problem.w_nodes[1]], [problem.state]):
        for leaf in problem.leaves:
            leaf.requires_grad_(any(leaf is w for w in wanted))
        (gradient,) = torch.autograd.grad(problem.run(fused, "nodes"), wanted, problem.gradient)
        assert error(gradient, everything[wanted[0]]) < 1e-10
    with torch.no_grad():
        for leaf in problem.leaves:
            leaf.requires_grad_()
        assert error(problem.run(fused, "nodes"), problem.run(reference, "nodes")) < 1e-10


def test_nan_and_infinity_arrive():
    """Training notices divergence by the loss."""
    for bad in (float("nan"), float("inf")):
        problem = Problem(2, 3, 20, 2, seed=1, dtype=torch.float32)
        with torch.no_grad():
            problem.inputs[0, 0, 0] = bad
            plain = problem.run(reference, "none")
            torch.testing.assert_close(problem.run(fused, "none"), plain, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", range(4))
def test_extreme_activations(op):
    """Tiny and saturated pre-activations; where gates are shut for good, gradients underflow, finite."""
    for scale in (1e-6, 1e-3, 30.0, 1e4):
        problem = Problem(1, 3, 40, 1, seed=op, program=Program((op, op), (0,), (0, 1)), dtype=torch.float32)
        with torch.no_grad():
            problem.inputs.mul_(scale), problem.state.mul_(scale)
        if scale < 1e3:
            assert_equal(problem, "none")
            continue
        hs, gradients = problem.gradients(fused, "none")
        assert error(hs, problem.run(reference, "none")) < 1e-5
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("order", [1, 2])
def test_architecture_gradient_is_the_same(tiny_task, restored, float64, order):
    """Through functional_call, dropout and carried state: both kernels give one gradient."""
    space = RecurrentCell(n_nodes=3)
    model = {"width": 10, "dropout_x": 0.3, "dropout_hidden": 0.3, "dropout_input": 0.2, "dropout_output": 0.2}
    training = Training(epochs=1, model=model, batches={"batch_size": 6, "bptt": 7})
    results = {}
    for kernel in ("reference", "fused"):
        set_kernel(kernel)
        estimator = Shared(space, tiny_task, 0, torch.device("cpu"), training=training)
        estimator.model.double()
        weights = WeightTraining(estimator.model, tiny_task, training, 0, torch.device("cpu"))
        strategy = Gradient(space, tiny_task.objective, 0, order=order)
        steps = []

        def learn(step: LearnStep, strategy=strategy, steps=steps):
            steps.append(architecture_gradient(step, strategy.alphas, strategy.mixture, order))

        strategy.learn = learn
        valid_stream = tiny_task.stream("valid", estimator.valid_batches, 0)
        estimator._learn(strategy, weights, weights.draw(), valid_stream)
        results[kernel] = steps[0]["nodes"]
    assert error(results["fused"], results["reference"]) < 1e-10


def test_what_it_does_not_take(restored):
    """Other types, autocast and gradients of masks run the reference."""
    set_kernel("fused")
    problem = Problem(2, 3, 6, 2, seed=1, masks=(True, True))
    weights = (problem.w_input, *problem.w_nodes)
    assert fused.takes(problem.inputs, problem.state, weights, *problem.masks)
    assert not fused.takes(problem.inputs.bfloat16(), problem.state, weights, *problem.masks)
    with torch.autocast("cpu"):
        assert not fused.takes(problem.inputs, problem.state, weights, *problem.masks)
    problem.masks[1].requires_grad_()
    hs = problem.run(dispatch, "none")
    assert torch.autograd.grad(hs.sum(), problem.masks[1])[0].abs().sum() > 0


def test_sizes_that_do_not_fit_are_refused():
    problem = Problem(2, 3, 6, 2, seed=1)
    problem.state = problem.state[:2]
    with pytest.raises(RuntimeError, match=r"state is \[2, 6\], expected \[3, 6\]"):
        problem.run(fused, "none")


def test_unknown_kernel():
    with pytest.raises(UserError, match="Did you mean 'fused'"):
        set_kernel("fusd")


def test_without_a_compiler(monkeypatch, restored):
    """`auto` falls back and says why; `fused` is refused."""
    monkeypatch.setattr(fused, "compiler", lambda: None)
    monkeypatch.setattr(fused, "load", fused.load.__wrapped__)
    fused.library_path.cache_clear()
    try:
        assert decide(lambda: 3600.0) == ("reference", "no C++ compiler found (CXX, c++, g++, clang++)")
        with pytest.raises(UserError, match="no C\\+\\+ compiler"):
            set_kernel("fused")
    finally:
        fused.library_path.cache_clear()


def test_auto_compiles_only_if_that_pays(monkeypatch):
    monkeypatch.setattr(fused, "is_cached", lambda: False)
    assert decide(lambda: 10.0)[0] == "reference"
    assert decide(lambda: 1000.0)[0] == "fused"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient", "random"])
def test_a_small_search_is_the_same_with_either_kernel(name, tiny_task, tmp_path, restored, float64):
    """Same genotypes, the same loss curve to 1e-3; in float64, since batch norm over six rows is chaotic."""
    found = []
    for kernel in ("reference", "fused"):
        set_kernel(kernel)
        space = RecurrentCell(n_nodes=3)
        training = Training(
            epochs=2,
            model={"width": 8, "dropout_hidden": 0.2},
            batches={"batch_size": 6, "bptt": 8},
            optimizer=Optimizer(learning_rate=1.0),
        )
        shared = Shared(space, tiny_task, 0, torch.device("cpu"), training=training)
        settings = {"learning_rate": 0.05} if name == "gradient" else {}
        strategy = component("strategy", name)(space, tiny_task.objective, 0, **settings)
        shared.prepare(strategy, Job(tmp_path / kernel))
        losses = [e["train_loss"] for e in read_events(tmp_path / kernel / "events.jsonl") if e["event"] == "epoch"]
        found.append((losses, strategy.ask(1)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    assert found[1][1] == found[0][1]

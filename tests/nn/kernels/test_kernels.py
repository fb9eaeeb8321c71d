"""Every fast kernel equals the reference, values and all gradients, and leaves to it what it must.

Joining the table of kernels means being tested here.
"""

import pytest
import torch
from segments import BATCH_NORMS, MASKS, PROGRAM, Problem, assert_equal, bit_equal, errors, random_program

from lmnas.core.contracts import LearnStep
from lmnas.core.errors import UserError
from lmnas.core.events import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.core.registry import component
from lmnas.methods.estimators.shared import Shared
from lmnas.methods.strategies.gradient import Gradient, architecture_gradient
from lmnas.nn import kernels
from lmnas.nn.kernel_table import KERNELS, PLAIN
from lmnas.nn.kernels import Program, current, dispatch, kernel_in_use, use, using
from lmnas.nn.kernels.choice import kernel_named
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.runs.build import covering_space
from lmnas.spaces.recurrent.cell import RecurrentCell

FAST = [name for name in KERNELS if name != PLAIN]


@pytest.fixture(scope="module", params=FAST)
def fast(request):
    """The name of a kernel that can be had here."""
    try:
        kernel_named(request.param).prepare()
    except UserError as problem:
        pytest.skip(str(problem))
    return request.param


@pytest.fixture(scope="module")
def kernel(fast):
    return kernel_named(fast)


@pytest.fixture
def restored():
    """What is in use comes back after the test."""
    with using():
        yield


@pytest.mark.parametrize("output", ["all-nodes", "loose-ends"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_genotypes(kernel, dtype, output):
    """60 genotypes; sizes, masks and batch norms change from one to the next; fixed ones and ones of many."""
    for seed in range(60):
        n = (1, 2, 5, 8, 11)[seed % 5]
        problem = Problem(
            1 + seed % 4,
            (3, 4, 7)[seed % 3] if dtype == torch.float64 else (12, 16, 24)[seed % 3],
            (5, 16, 33)[seed // 2 % 3],
            n,
            seed=seed,
            masks=MASKS[seed % 4],
            program=random_program(n, output, seed),
            sampled=seed // 3 % 2 == 0,
            dtype=dtype,
        )
        assert_equal(problem, kernel, BATCH_NORMS[seed // 4 % 3])


@pytest.mark.parametrize("sharing", ["node", "edge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_mixtures(kernel, dtype, sharing):
    for seed in range(24):
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
        assert_equal(problem, kernel, BATCH_NORMS[seed // 4 % 3])


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize("kind", ["path", "sampled", "node", "edge"])
def test_every_mask_and_batch_norm(kernel, kind, batch_norm):
    program = Program((0, 1, 2, 3, 0), (0, 1, 1, 0), (0, 3, 4)) if kind in ("path", "sampled") else None
    for masks in MASKS:
        problem = Problem(3, 4, 18, 4, seed=1, masks=masks, sharing=kind, program=program, sampled=kind == "sampled")
        assert_equal(problem, kernel, batch_norm)


@pytest.mark.parametrize("t, b, batch_norm", [(1, 1, "none"), (1, 4, "nodes"), (6, 1, "none"), (2, 1, "nodes")])
def test_short_and_narrow_segments(kernel, t, b, batch_norm):
    """One step, one stream, one node, one column. Batch norm of one stream gives zeros."""
    for h in (1, 17):
        for n, program in ((1, Program((0, 2), (0,), (1,))), (1, None), (3, None)):
            for sampled in (False, True):
                problem = Problem(t, b, h, n, seed=t + b, program=program, sampled=sampled)
                assert_equal(problem, kernel, batch_norm)


@pytest.mark.parametrize("name", ["darts-v2", "darts-v1", "enas", "enas-lm"])
def test_published_cells(kernel, name):
    program = covering_space(load_genotype(name)).program(load_genotype(name))
    problem = Problem(9, 6, 40, len(program.inputs), seed=2, masks=(True, True), program=program)
    assert_equal(problem, kernel)


def test_gradients_by_finite_differences(kernel):
    for program, sampled in ((None, False), (Program((0, 1, 2), (0, 1), (1, 2)), False), (PROGRAM, True)):
        n = 2 if program is None else len(program.inputs)
        for batch_norm in BATCH_NORMS:
            problem = Problem(2, 3, 2, n, seed=5, masks=(True, True), program=program, sampled=sampled)
            # every entry asks for one more backward through the same graph, whose tape the first has used up
            assert torch.autograd.gradcheck(lambda *_, p=problem, bn=batch_norm: p.run(kernel, bn), problem.leaves)


def test_retained_graph_gives_the_same_gradients_twice(kernel):
    problem = Problem(3, 4, 6, 3, seed=1)
    hs = problem.run(kernel, "nodes")
    assert bit_equal(problem.gradients(hs, retain_graph=True), problem.gradients(hs))


def test_two_graphs_do_not_share_memory(kernel):
    problems = [Problem(3, 4, 6, 3, seed=1), Problem(3, 4, 6, 3, seed=2)]
    results = [problem.run(kernel, "nodes") for problem in problems]
    for problem, hs in zip(problems, results, strict=True):
        assert max(errors(problem.gradients(hs), problem.solution(batch_norm="nodes")[1:])) < 1e-10


@pytest.mark.parametrize("kind", ["path", "sampled", "mixture"])
def test_runs_are_bit_equal(kernel, kind):
    program = None if kind == "mixture" else PROGRAM
    problem = Problem(
        3, 64, 32, 3, seed=3, masks=(True, True), program=program, sampled=kind == "sampled", dtype=torch.float32
    )
    assert bit_equal(problem.solution(kernel, "nodes"), problem.solution(kernel, "nodes"))


@pytest.mark.parametrize("kind", ["path", "sampled", "mixture"])
def test_only_what_is_asked_for(kernel, kind):
    """The architecture step wants no weight gradients; without any, nothing is kept."""
    program = None if kind == "mixture" else PROGRAM
    problem = Problem(3, 4, 6, 3, seed=1, program=program, sampled=kind == "sampled")
    hs, *gradients = problem.solution(batch_norm="nodes")
    for wanted, expected in zip(problem.leaves, gradients, strict=True):
        for leaf in problem.leaves:
            leaf.requires_grad_(leaf is wanted)
        (gradient,) = torch.autograd.grad(problem.run(kernel, "nodes"), [wanted], problem.gradient)
        assert max(errors([gradient], [expected])) < 1e-10
    with torch.no_grad():
        for leaf in problem.leaves:
            leaf.requires_grad_()
        ours = problem.run(kernel, "nodes")
        assert not ours.requires_grad and max(errors([ours], [hs])) < 1e-10


def test_weights_changed_between_the_passes_are_noticed(kernel):
    problem = Problem(3, 4, 6, 3, seed=1)
    hs = problem.run(kernel)
    with torch.no_grad():
        problem.w_input += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        problem.gradients(hs)


def test_nan_and_infinity_arrive(kernel):
    """Training notices divergence by the loss."""
    for bad in (float("nan"), float("inf")):
        for program, sampled in ((None, False), (Program((0, 2, 1), (0, 1), (1, 2)), False)):
            problem = Problem(2, 3, 20, 2, seed=1, program=program, sampled=sampled, dtype=torch.float32)
            with torch.no_grad():
                problem.inputs[0, 0, 0] = bad
                plain = problem.run()
                torch.testing.assert_close(problem.run(kernel), plain, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_what_it_does_not_take(fast, kernel):
    """Other types, autocast and gradients of masks run the reference."""
    problem = Problem(2, 3, 6, 2, seed=1, masks=(True, True))
    x = problem.operands()
    assert kernel.takes(x, x.weights)
    half = problem.operands()
    object.__setattr__(half, "inputs", half.inputs.bfloat16())
    assert not kernel.takes(half, half.weights)
    with torch.autocast("cpu"):
        assert not kernel.takes(x, x.weights)
    problem.masks[1].requires_grad_()
    with using(kernel=fast):
        hs = problem.run(Dispatched())
    assert torch.autograd.grad(hs.sum(), problem.masks[1])[0].abs().sum() > 0


class Dispatched:
    """What the spaces call, as a kernel."""

    def recurrent_path(self, x, program, sampled):
        return dispatch.recurrent_path(x, program, sampled)

    def recurrent_mixture(self, x, *mixture):
        return dispatch.recurrent_mixture(x, *mixture)


# -------------------------------------------------------------------------------------------------------- in searches


@pytest.mark.parametrize("order", [1, 2])
def test_architecture_gradient_is_the_same(fast, restored, tiny_task, float64, order):
    """Through functional_call, dropout and carried state: both kernels give one gradient."""
    space = RecurrentCell(n_nodes=3)
    model = {"width": 10, "dropout_x": 0.3, "dropout_hidden": 0.3, "dropout_input": 0.2, "dropout_output": 0.2}
    training = Training(epochs=1, model=model, batches={"batch_size": 6, "bptt": 7})
    results = {}
    for name in (PLAIN, fast):
        use(kernel=name)
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
        results[name] = steps[0]["nodes"]
    assert max(errors([results[fast]], [results[PLAIN]])) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gradient", "random"])
def test_a_small_search_is_the_same_with_either_kernel(fast, restored, name, tiny_task, tmp_path, float64):
    """Same genotypes, the same loss curve to 1e-3; in float64, since batch norm over six rows is chaotic."""
    found = []
    for kernel in (PLAIN, fast):
        use(kernel=kernel)
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


# ---------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("program, sampled", [(None, False), (PROGRAM, False), (PROGRAM, True)])
def test_the_kernel_chosen_runs(fast, kernel, program, sampled):
    """Bit by bit its own result, which is not the reference's."""
    problem = Problem(4, 8, 24, 3, seed=1, program=program, sampled=sampled, dtype=torch.float32)
    with using(kernel=fast):
        chosen = problem.run(Dispatched())
    assert torch.equal(chosen, problem.run(kernel))
    assert torch.equal(problem.run(Dispatched()), problem.run()), "what was in use before came back"


def test_a_choice_lasts_as_long_as_its_block():
    before = current()
    with using(kernel="segment", chunk=77):
        assert (current().kernel, current().chunk, kernel_in_use()) == ("segment", 77, "segment")
        with kernels.plain():
            assert (kernel_in_use(), current().chunk) == ("reference", 77)
        use(chunk=5)
        with pytest.raises(ZeroDivisionError), kernels.planning("segment"):
            assert current().planned == "segment"
            raise ZeroDivisionError
        assert current().chunk == 5 and current().planned == before.planned
    assert current() == before


def test_names_of_what_runs():
    """A GPU runs recorded graphs, other devices the reference."""
    with using(kernel="segment"):
        assert [kernel_in_use(device) for device in ("cpu", "cuda", "mps")] == ["segment", "graphs", "reference"]
    with using(kernel="reference"):
        assert [kernel_in_use(device) for device in ("cpu", "cuda")] == ["reference", "reference"]
    assert kernel_named("fused").runs_on == {"cpu": "fused", "cuda": "graphs"}


def test_unknown_kernel():
    with pytest.raises(UserError, match=r"kernel 'fusd' is unknown.*Did you mean 'fused'"):
        use(kernel="fusd")

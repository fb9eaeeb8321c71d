"""Recorded segments: buffers that are used again and again give what the reference gives.

On a GPU the recordings are CUDA graphs. Elsewhere `Rerun` stands in: it runs the function again at every replay, on the
same buffers and into the same outputs, so that everything but the recording itself is tested without a GPU.
"""

import contextlib
import logging

import pytest
import torch
from segments import PROGRAM, Problem, assert_equal, bit_equal, errors, random_program
from torch.utils._python_dispatch import TorchDispatchMode

from lmnas.core.contracts import LearnStep
from lmnas.core.events import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.core.seeds import generator, rng
from lmnas.methods.estimators.shared import Shared
from lmnas.methods.strategies.gradient import Gradient, architecture_gradient
from lmnas.methods.strategies.random_search import RandomSearch
from lmnas.nn.kernels import Program, graphs, using
from lmnas.nn.kernels.choice import kernel_named
from lmnas.nn.kernels.graphs import Recorded
from lmnas.nn.kernels.passes import Eager
from lmnas.nn.kernels.segment import Segment
from lmnas.nn.train import fit, initialise
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.runs.build import build_model
from lmnas.spaces.recurrent.cell import RecurrentCell

OTHER = Program((3, 2, 1, 0), (0, 1, 2), (0, 3))
KINDS = {"path": (PROGRAM, False), "loose ends": (OTHER, False), "sampled": (OTHER, True), "mixture": (None, False)}


class Recordable(TorchDispatchMode):
    """Refuses what a CUDA graph cannot record: values that come from the processor or go to it."""

    REFUSED = frozenset({"lift_fresh", "_local_scalar_dense", "nonzero", "equal", "masked_select"})

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        by_value = name == "index" and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        moved = name == "_to_copy" and (keywords or {}).get("device") is not None
        if name in self.REFUSED or by_value or moved:
            raise AssertionError(f"{name} cannot be recorded")
        return function(*arguments, **(keywords or {}))


class Rerun:
    """What a CUDA graph does, by running the function again. Recording runs it once, as a CUDA graph's warm-up does."""

    def __init__(self, function):
        self.function = function
        with Recordable():
            function()

    def replay(self):
        self.function()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu])])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return request.param


@pytest.fixture
def recorded(device):
    """A runner that records at the first call; `made` counts what it recorded."""
    return runner_for(device)


def runner_for(device, **settings):
    made = []

    def record(function):
        made.append(Rerun(function) if device == "cpu" else graphs.CudaGraph(function))
        return made[-1]

    runner = Recorded(record, **{"after": 0, **settings})
    runner.made = made
    return runner


def problem_of(kind, seed, device, t=3, masks=(True, True), **settings):
    program, sampled = KINDS[kind]
    return Problem(t, 4, 8, 3, seed=seed, masks=masks, program=program, sampled=sampled, device=device, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_replays_see_new_values(kind, recorded, device):
    """Inputs, carried state, weights, masks, mixtures and gradients change from call to call; the recording stays."""
    for seed in range(4):
        for batch_norm in ("none", "nodes", "output"):
            assert_equal(problem_of(kind, seed, device), Segment(recorded), batch_norm)
    assert len(recorded.made) == 6, "forward and backward for each of three batch norms"


def test_one_recording_for_all_sampled_programs(recorded, device):
    def problem(seed, sampled):
        program = random_program(3, "loose-ends", seed)
        return Problem(3, 4, 8, 3, seed=seed, program=program, sampled=sampled, device=device)

    for seed in range(6):
        assert_equal(problem(seed, True), Segment(recorded), "output")
    assert len(recorded.made) == 2
    for seed in range(3):  # a program that stays is part of the recording
        assert_equal(problem(seed, False), Segment(recorded), "output")
    assert len(recorded.made) == 8


def test_structure_is_told_apart(recorded, device):
    """Masks, sharing, lengths and types: each has its own recording and the right result, in any order."""
    problems = [
        problem_of("mixture", 0, device, masks=masks, t=t)
        for masks in ((False, False), (True, False), (False, True), (True, True))
        for t in (3, 5)
    ]
    problems.append(Problem(3, 4, 8, 3, seed=1, sharing="edge", device=device))
    problems.append(Problem(3, 12, 8, 3, seed=1, dtype=torch.float32, device=device))
    for problem in problems * 2:
        assert_equal(problem, Segment(recorded), "nodes")
    assert len(recorded.made) == 2 * len(problems)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_handed_out_stays(kind, recorded, device):
    """Results and gradients are the caller's: later replays do not change them."""
    problem = problem_of(kind, 0, device)
    first = problem.solution(Segment(recorded), "nodes")
    copies = [tensor.detach().clone() for tensor in first]
    problem_of(kind, 1, device).solution(Segment(recorded), "nodes")
    assert bit_equal(first, copies)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tape_that_was_overwritten_is_made_again(kind, recorded, device):
    """Forward, forward, backward, backward: also across keys, which share their memory, and for a retained graph."""
    one, two, longer = (problem_of(kind, 0, device), problem_of(kind, 1, device), problem_of(kind, 2, device, t=5))
    problems = [one, two, longer]
    expected = [problem.solution(batch_norm="nodes")[1:] for problem in problems]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        results = [problem.run(Segment(recorded), "nodes") for problem in problems]
        for i in order:
            for _ in range(2):
                gradients = problems[i].gradients(results[i], retain_graph=True)
                assert max(errors(gradients, expected[i])) < 1e-10


def test_evaluation_between_the_passes(recorded, device):
    """A pass without gradients takes the shared memory; the training pass around it does not notice."""
    problem, other = problem_of("mixture", 0, device), problem_of("mixture", 1, device)
    hs = problem.run(Segment(recorded), "nodes")
    with torch.no_grad():
        evaluated = other.run(Segment(recorded), "nodes")
    assert not evaluated.requires_grad
    assert max(errors([evaluated], [other.run(batch_norm="nodes")])) < 1e-10
    assert max(errors([hs, *problem.gradients(hs)], problem.solution(batch_norm="nodes"))) < 1e-10


def test_gradients_accumulate_over_segments(recorded, device):
    """Two segments with the state carried between them, inside the graph of autograd; gradients add up in `.grad`."""
    problem = problem_of("path", 0, device)
    results = []
    for runner in (recorded, Eager()):
        weights = [problem.w_input.detach().clone().requires_grad_()]
        weights += [w.detach().clone().requires_grad_() for w in problem.w_nodes]
        for _ in range(2):
            state = problem.state.detach()
            for _ in range(2):
                changes = {"inputs": problem.inputs.detach(), "state": state, "w_input": weights[0]}
                hs = problem.run(Segment(runner), w_nodes=weights[1:], **changes)
                state = hs[-1]
            (hs * problem.gradient).sum().backward()
        results.append([hs, *(w.grad for w in weights)])
    assert max(errors(*results)) < 1e-10


def test_only_what_is_asked_for(recorded, device):
    problem = problem_of("mixture", 0, device)
    everything = dict(zip(problem.leaves, problem.solution(batch_norm="nodes")[1:], strict=True))
    for wanted in (problem.mixture[1], problem.inputs, problem.w_nodes[1]):
        for leaf in problem.leaves:
            leaf.requires_grad_(leaf is wanted)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(problem.run(Segment(recorded), "nodes"), [wanted], problem.gradient)
            assert max(errors([gradient], [everything[wanted]])) < 1e-10
        (space,) = recorded.workspaces.values()
        *_, entry = space.entries.values()
        assert sum(result is not None for result in entry.results) == 1, "nothing else is computed"


def test_recorded_when_a_key_comes_again(device):
    """Rare lengths are not recorded, the least recently used recordings are dropped, and memory has one block."""
    runner = runner_for(device, after=1, max_recordings=3)
    for length in (2, 3, 4, 5, 6):
        assert_equal(problem_of("mixture", 0, device, t=length), Segment(runner), "nodes")
    assert not runner.made
    for length in (6, 5, 4, 3, 2, 6, 2):
        assert_equal(problem_of("mixture", 1, device, t=length), Segment(runner), "nodes")
    (space,) = runner.workspaces.values()
    lengths = [key[1][0] for key in space.entries]
    assert lengths == [3, 6, 2]
    assert len(runner.made) == 12
    block = space.block.data_ptr()
    assert all(e.arguments.inputs.data_ptr() == block for e in space.entries.values())


def test_a_block_that_grows_forgets_its_recordings(device):
    """Between the forward and the backward pass of a shorter segment, too."""
    recorded = runner_for(device, least_block=0)
    short, long = problem_of("path", 0, device), problem_of("path", 1, device, t=9)
    hs = short.run(Segment(recorded), "nodes")
    assert_equal(long, Segment(recorded), "nodes")
    (space,) = recorded.workspaces.values()
    assert len(space.entries) == 1
    assert max(errors([hs, *short.gradients(hs)], short.solution(batch_norm="nodes"))) < 1e-10
    assert len(space.entries) == 2
    hs = short.run(Segment(recorded), "nodes")
    recorded.clear()
    assert max(errors([hs, *short.gradients(hs)], short.solution(batch_norm="nodes"))) < 1e-10


@pytest.mark.parametrize("failing", [0, 1], ids=["forward", "backward"])
def test_where_recording_fails_it_runs_anyway(failing, device, caplog):
    calls = []

    def record(function):
        calls.append(1)
        if len(calls) == failing + 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return Rerun(function)

    runner = Recorded(record, after=0)
    with caplog.at_level(logging.WARNING, "lmnas"):
        for seed in range(3):
            assert_equal(problem_of("mixture", seed, device), Segment(runner), "nodes")
    assert [r.getMessage() for r in caplog.records] == [
        "kernel: a segment runs without a CUDA graph, which is slower: operation not permitted when stream is capturing"
    ]
    assert len(calls) == failing + 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[[0, 2]],
        lambda x: x * torch.tensor([2.0]),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x[x > 0],
        lambda x: x.to("meta"),
    ],
)
def test_the_check_can_fail(function):
    """A constant, an index list, a decision by value, a shape by value, a copy between devices."""
    with pytest.raises(AssertionError, match="cannot be recorded"):
        Rerun(lambda: function(torch.ones(3)))


def test_a_supernet_samples_its_paths(recorded):
    """Its paths change, so one recording serves them all; a stand-alone cell's does not."""
    space = RecurrentCell(n_nodes=2)
    net = space.supernet(4)
    net.initialise(generator(0, "init"), 0.1)
    inputs, state = torch.zeros(2, 3, 4), torch.zeros(3, 4)
    genotypes = [space.sample(rng(0, "paths", number)) for number in range(2)]
    assert genotypes[0] != genotypes[1]
    with using_runner(recorded):
        for genotype in genotypes:
            net(inputs, state, {}, genotype)
        assert len(recorded.made) == 1
        net(inputs, state, {}, {"nodes": torch.full((3, 5), 0.2)})
        assert len(recorded.made) == 2
        for genotype in genotypes:
            cell = space.build(genotype, 4)
            cell.load_state_dict(net.inherit(genotype))
            cell(inputs, state, {})
        assert len(recorded.made) == 4


@contextlib.contextmanager
def using_runner(runner):
    """Inside, the segment kernel runs, by this runner."""
    kernel = kernel_named("segment")
    kernel.chosen_runner, before = runner, kernel.chosen_runner
    try:
        with using(kernel="segment"):
            yield
    finally:
        kernel.chosen_runner = before


@pytest.fixture
def until_the_end():
    """Contexts that the test leaves open."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("order", [1, 2])
def test_architecture_gradient_is_the_same(order, tiny_task, recorded, device, until_the_end, float64):
    """Through functional_call, dropout and carried state, several steps in a row: recordings and reference agree."""
    space = RecurrentCell(n_nodes=3)
    model = {"width": 10, "dropout_x": 0.3, "dropout_hidden": 0.3, "dropout_input": 0.2, "dropout_output": 0.2}
    training = Training(epochs=1, model=model, batches={"batch_size": 6, "bptt": 7})
    results = {}
    for kernel in ("reference", "recorded"):
        if kernel == "recorded":
            until_the_end.enter_context(using_runner(recorded))
        settings = training.model_settings(tiny_task)
        net = tiny_task.model(space.supernet(settings.width), settings)
        net.initialise(generator(0, "init"))
        net = net.to(device)
        weights = WeightTraining(net, tiny_task, training, 0, torch.device(device))
        strategy = Gradient(space, tiny_task.objective, 0)
        results[kernel] = []
        for _ in range(3):
            batch, valid = weights.draw(), weights.draw()
            train_masks, valid_masks = weights.masks("learn-train", batch), weights.masks("learn-valid", valid)

            def loss_on(which, masks, parameters, mixture, net=net):
                return torch.func.functional_call(net, dict(parameters), (which, masks, mixture, False))[0]

            step = LearnStep(
                step=0,
                train_loss=lambda p, m, b=batch, k=train_masks: loss_on(b, k, p, m),
                valid_loss=lambda p, m, b=valid, k=valid_masks: loss_on(b, k, p, m),
                weights=dict(net.named_parameters()),
                learning_rate=0.5,
                weight_decay=1e-6,
                clip=0.25,
            )
            results[kernel].append(architecture_gradient(step, strategy.alphas, strategy.mixture, order)["nodes"])
            weights.update(batch, {name: p.to(device) for name, p in strategy.choice(0).items()})
    assert recorded.made
    assert max(errors(results["recorded"], results["reference"])) < 1e-8


@pytest.mark.parametrize("kind", ["training", "shared weights"])
def test_a_training_is_the_same(kind, tiny_task, device, tmp_path, until_the_end, float64):
    """Random lengths, dropout, evaluation between epochs; sampled paths: recordings are made as they come."""
    runner = runner_for(device, after=1, max_recordings=4)
    settings = Training(
        epochs=2 if kind == "training" else 1,
        model={"width": 8, "dropout_output": 0.2, "dropout_hidden": 0.2, "dropout_x": 0.2},
        batches={"batch_size": 8, "bptt": 9, "length_std": 2.0},
        optimizer=Optimizer(learning_rate=1.0),
    )
    curves = []
    for kernel in ("reference", "recorded"):
        if kernel == "recorded":
            until_the_end.enter_context(using_runner(runner))
        job, on = Job(tmp_path / kernel), torch.device(device)
        if kind == "training":
            model = initialise(build_model(tiny_task, load_genotype("enas"), settings), 0).to(on)
            fit(model, tiny_task, settings, 0, job, on)
        else:
            space = RecurrentCell(n_nodes=3, output="loose-ends", sharing="edge", batch_norm="output")
            estimator = Shared(space, tiny_task, 0, on, training=settings)
            estimator.prepare(RandomSearch(space, tiny_task.objective, 0), job)
        events = [e for e in read_events(job.directory / "events.jsonl") if e["event"] == "epoch"]
        curves += [[value for e in events for value in (e["train_loss"], e["valid"]) if value is not None]]
    assert curves[1] == pytest.approx(curves[0], rel=1e-8)
    assert len(runner.made) > 4


@pytest.mark.gpu
def test_graphs_are_what_runs_on_a_gpu():
    """With the process' own recordings, float32 and float64, path and mixture."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    graphs.recorded.clear()
    for seed in range(3):
        for program in (PROGRAM, None):
            for dtype in (torch.float64, torch.float32):
                problem = Problem(
                    5, 16, 32, 3, seed=seed, masks=(True, True), program=program, dtype=dtype, device="cuda"
                )
                found = problem.solution(kernel_named("segment"), "nodes")
                tolerance = 1e-10 if dtype == torch.float64 else 1e-3
                assert max(errors(found, problem.solution(batch_norm="nodes"))) < tolerance
    (space,) = graphs.recorded.workspaces.values()
    assert len(space.entries) == 4 and all(entry.backward for entry in space.entries.values())

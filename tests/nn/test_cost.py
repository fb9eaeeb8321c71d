"""Forecasts of memory and operations: worked numbers, and what a real step holds."""

import copy
import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lmnas.core.contracts import Batch, Loss, Model, Task
from lmnas.core.errors import UserError
from lmnas.core.seeds import generator, rng
from lmnas.nn import cost as forecast
from lmnas.nn.cost import StepBytes, available, forward_flops, kept_bytes, step_forecast, training_bytes
from lmnas.nn.kernels import DEFAULT_CHUNK, fused, using
from lmnas.nn.kernels.cross_entropy import linear_cross_entropy
from lmnas.nn.kernels.planned import fused_elements
from lmnas.nn.kernels.reference import Program
from lmnas.nn.training.settings import Training
from lmnas.runs import forecast as forecasts
from lmnas.runs.build import build_model, open_recipe, open_space, open_task
from lmnas.runs.recipe import load_recipe
from lmnas.runs.start import start
from lmnas.spaces.recurrent.cell import RecurrentCell
from lmnas.tasks.language_modeling import BatchSettings, LanguageModel, ModelSettings

CPU = torch.device("cpu")
MIB = 2**20


class Toy(Model):
    """tanh(x W) V: the gradient of V needs the tanh, that of W needs x and the tanh."""

    def __init__(self):
        super().__init__()
        self.w, self.v, self.unused = (nn.Parameter(torch.empty(*shape)) for shape in ((8, 16), (16, 4), (99, 99)))

    def initialise(self, generator):
        pass

    def forward(self, batch, masks, choice=None, penalised=True):
        return Loss(((batch.inputs.float() @ self.w).tanh() @ self.v).sum())


def toy_batch():
    return Batch(torch.zeros(5, 8), torch.zeros(5), 5)


# -------------------------------------------------------------------------------------------------- operations, bytes


def test_toy_operations_and_bytes():
    """Products 2 * 5 * 8 * 16 and 2 * 5 * 16 * 4; kept are x (5 x 8) and the tanh (5 x 16), of weights V alone."""
    model = forecast.on_meta(Toy)
    assert forward_flops(model, toy_batch(), None) == 1280 + 640
    assert kept_bytes(model, toy_batch(), None, "reference") == (4 * (40 + 80), 4 * 64)


def test_parts_of_a_step():
    """V takes part, (99, 99) is the largest parameter; 15 % on top of the parts, and the libraries' own."""
    step = step_forecast(forecast.on_meta(Toy), toy_batch(), None, "reference", optimizer_copies=1, copies=2)
    weights = 4 * (128 + 64 + 9801)
    assert step == StepBytes(weights, 4 * (2 * 64 + 9801), weights, 480, 8 * DEFAULT_CHUNK, 2 * weights)
    parts = 4 * weights + 4 * (2 * 64 + 9801) + 480 + 8 * 1000
    assert step.with_chunk(1000).total == int(1.15 * parts) + 64 * MIB


def test_a_training_holds_more_than_a_step():
    step = StepBytes(100, 100, 0, 1000, 0, 0)
    assert training_bytes(step, averaged=False, best=False) == step.total
    assert training_bytes(step, averaged=True, best=True) == step.total + 200
    # a checkpoint of 300 is made and written as one piece, when what was kept is free
    bare = StepBytes(100, 100, 0, 0, 0, 0)
    assert training_bytes(bare, averaged=True, best=True) == bare.total + 200 + 600


def language_model(**settings):
    space = RecurrentCell(n_nodes=3)
    return LanguageModel(space.supernet(12), 50, ModelSettings(width=12, dropout_x=0.2, dropout_output=0.2, **settings))


@pytest.mark.parametrize("mixture", [True, False])
def test_meta_holds_what_a_real_step_holds(mixture):
    """The same count on real tensors of the CPU."""
    model = language_model(tar=0.1)
    model.initialise(generator(0, "test"))
    tokens = torch.zeros(6, 4, dtype=torch.long)
    batch = Batch(tokens, tokens, 24)
    choice = model.body.space.sample(rng(0))
    if mixture:
        choice = {"nodes": torch.full((6, 5), 0.2, requires_grad=True)}
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    masks = model.draw_masks(batch, generator(0, "masks"))
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss, _ = model(batch, masks, choice)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(storage.nbytes() for address, storage in held.items() if address not in own)
    del loss
    if mixture:
        choice = {"nodes": choice["nodes"].detach().to("meta").requires_grad_()}
    found, _ = kept_bytes(copy.deepcopy(model).to("meta"), batch, choice, "reference")
    # tensors of the real count may share or reuse an address; constants of a few bytes live on one side alone
    assert found == pytest.approx(real, rel=0.02)


def test_fused_layout():
    """T = 2, B = 3, H = 4, one node: a step keeps [c, a] twice (2 x 24), two states (24) and deviations (8)."""
    tape = 2 * (24 + 24 + 24 + 8)
    moving = 5 * 12 + 3 * 2 * 12
    packed = 2 * 2 * 4 * 4
    assert fused_elements(2, 3, 4, 1, 1) == tape + moving + packed


@pytest.mark.parametrize("mixture", [True, False])
def test_the_fused_kernel_keeps_about_what_is_planned(mixture):
    """The block that its forward really returns, at sizes where padding does not matter."""
    try:
        fused.load()
    except fused.Unavailable as problem:
        pytest.skip(f"no fused kernel: {problem}")
    t, b, h, n = 10, 32, 64, 4
    n_edges = n * (n + 1) // 2
    kept = []
    forward = torch.ops.lmnas.segment_forward
    w_nodes = [torch.zeros(h, 2 * h) for _ in range(n)]
    shares = torch.full((n + 1,), 1 / n)
    tensors = torch.zeros(t, b, h), torch.zeros(b, h), torch.zeros(2 * h, 2 * h), w_nodes
    if mixture:
        kept = forward(*tensors, torch.zeros(4), torch.zeros(n_edges, 4), shares, [], [], None, None, 1, True)
    else:
        program = Program((0, 1, 2, 3, 0), (0, 1, 2, 3), (4,))
        empty = torch.empty(0)
        kept = forward(*tensors, empty, empty, shares, list(program.ops), list(program.inputs), None, None, 0, True)
    planned = fused_elements(t, b, h, n, n_edges if mixture else n)
    assert 0.6 * planned < kept[1].numel() <= planned


def test_the_longest_segment_is_what_counts(tiny_task):
    """Random lengths reach at most base + 20."""
    constant = tiny_task.largest_batch(BatchSettings(batch_size=3, bptt=10))
    random = tiny_task.largest_batch(BatchSettings(batch_size=3, bptt=10, length_std=4.0))
    assert (constant.inputs.shape, random.inputs.shape) == ((10, 3), (30, 3))
    stream = tiny_task.stream("train", BatchSettings(batch_size=3, bptt=10, length_std=40.0), 0)
    assert max(len(stream.next().inputs) for _ in range(30)) == 30


def test_a_task_without_largest_batch_gives_its_first():
    class Plain(Task):
        stream = evaluate = data = model = score_batch = score_text = save_assets = None

    class Told(Plain):
        def stream(self, split, settings, seed):
            return SimpleNamespace(next=toy_batch) if split == "train" else None

    assert Told().largest_batch(None).inputs.shape == (5, 8)


# --------------------------------------------------------------------------------------------------- what there is


@pytest.fixture
def machine(monkeypatch):
    """A machine with 8 GiB free, no groups, no limits."""
    monkeypatch.setattr(forecast, "_meminfo", lambda name: 2**33)
    monkeypatch.setattr(forecast, "_cgroup_free", lambda: None)
    monkeypatch.setattr(forecast, "_mapped", lambda: 3 * 2**30)
    monkeypatch.setattr(forecast.resource, "getrlimit", lambda what: (forecast.resource.RLIM_INFINITY,) * 2)
    return monkeypatch


def test_free_memory_is_shared_among_workers(machine):
    assert available(CPU) == 2**33
    assert available(CPU, workers=4) == 2**31 - forecast.PROCESS
    machine.setattr(forecast, "_cgroup_free", lambda: 2**30)
    assert available(CPU) == 2**30


def test_address_space_counts_for_every_process_by_itself(machine):
    """Of 4 GiB, 3 are mapped already; another thread needs its stack."""
    machine.setattr(forecast.resource, "getrlimit", lambda what: (2**32, 2**32))
    assert available(CPU, threads=2) == 2**30 - 2 * forecast.THREAD_STACK
    assert available(CPU, workers=2, threads=2) == 2**30 - 2 * forecast.THREAD_STACK


@pytest.mark.parametrize(
    "membership, files, free",
    [
        ("0::/job\n", {"job/memory.max": "1000", "job/memory.current": "400"}, 600),
        # what the kernel can drop makes way
        (
            "0::/job\n",
            {"job/memory.max": "1000", "job/memory.current": "400", "job/memory.stat": "anon 5\ninactive_file 100\n"},
            700,
        ),
        # a limit above counts as well; `max` is none
        (
            "0::/outer/job\n",
            {
                "outer/job/memory.max": "max",
                "outer/job/memory.current": "1",
                "outer/memory.max": "50",
                "outer/memory.current": "20",
            },
            30,
        ),
        # in a container the group's own files may lie at the top
        ("0::/docker/abc\n", {"memory.max": "70", "memory.current": "20"}, 50),
        (
            "4:cpu:/x\n7:memory:/job\n",
            {"memory/job/memory.limit_in_bytes": "900", "memory/job/memory.usage_in_bytes": "100"},
            800,
        ),
        # version 1 says "no limit" by a huge number
        (
            "7:memory:/\n",
            {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "1"},
            None,
        ),
        ("0::/\n", {}, None),
    ],
)
def test_control_groups(tmp_path, membership, files, free):
    (tmp_path / "membership").write_text(membership)
    for name, content in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert forecast._cgroup_free(tmp_path / "fs", tmp_path / "membership") == free


def test_this_machine_tells_its_memory():
    """Beside what the C library says, and a mapping made here."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert forecast._meminfo("MemTotal") == physical
    assert 0 < available(CPU) <= physical
    before = forecast._mapped()
    with mmap.mmap(-1, 2**28):
        assert 2**28 <= forecast._mapped() - before < 2**28 + 2**26
    assert forecast._meminfo("NoSuchLine") is None


# ------------------------------------------------------------------------------------------------------------ plans


@pytest.fixture
def document(tmp_path, cache):
    (tmp_path / "text.txt").write_text(tiny.text(150))
    return tiny.recipe(tmp_path / "text.txt")


def work_of(recipe):
    """The opened recipe and its trainings."""
    opened = open_recipe(recipe)
    return opened, forecasts.workloads(opened, None)


def needs_of(recipe):
    return forecasts.needs(*work_of(recipe), "reference")


def test_every_training_of_a_recipe_is_forecast(document):
    """The search's supernet, with the second-order step's copies; the final training, averaged."""
    document["strategy"] = {"name": "gradient", "order": 2}
    document["train"]["training"]["optimizer"]["averaging"] = "nonmonotonic"
    recipe = load_recipe(document)
    found = forecasts.peaks(needs_of(recipe), DEFAULT_CHUNK)
    task, space = open_task(recipe), open_space(recipe)
    training: Training = recipe.train.training
    genotype = space.sample(rng(0))
    with torch.device("meta"):
        alone = build_model(task, genotype, training)
        shared = task.model(space.supernet(4), ModelSettings(width=4))
    batch = task.largest_batch(training.batch_settings(task))
    step = step_forecast(alone, batch, None, "reference")
    # what a path keeps depends a little on its operations
    assert found["train.training"] == pytest.approx(training_bytes(step, averaged=True, best=True), rel=1e-3)
    mixture = {"nodes": torch.zeros(3, 5, device="meta", requires_grad=True)}
    step = step_forecast(shared, batch, mixture, "reference", copies=5)
    assert found["estimator.training"] == training_bytes(step, averaged=False, best=False)


def test_larger_validation_batches_count(document):
    recipe = load_recipe(document)
    document["estimator"]["valid_batch_size"] = 40
    larger = forecasts.peaks(needs_of(load_recipe(document)), 1)
    assert larger["estimator.training"] > forecasts.peaks(needs_of(recipe), 1)["estimator.training"]


def test_short_memory_takes_a_smaller_chunk_then_refuses(document, monkeypatch):
    recipe = load_recipe(document)
    whole = max(forecasts.peaks(needs_of(recipe), DEFAULT_CHUNK).values())
    part = max(forecasts.peaks(needs_of(recipe), forecasts.SMALL_CHUNK).values())
    for there, chunk in ((whole, DEFAULT_CHUNK), (whole - 1, forecasts.SMALL_CHUNK), (part, forecasts.SMALL_CHUNK)):
        monkeypatch.setattr(forecasts, "available", lambda *arguments, there=there: there)
        assert forecasts.fitting_chunk(open_recipe(recipe), needs_of(recipe), DEFAULT_CHUNK) == chunk
    monkeypatch.setattr(forecasts, "available", lambda *arguments: part - 1)
    with pytest.raises(UserError) as refusal:
        forecasts.fitting_chunk(open_recipe(recipe), needs_of(recipe), DEFAULT_CHUNK)
    needed = f"needs about {part / 2**30:.2f} GiB of memory at its peak, {(part - 1) / 2**30:.2f} GiB are available"
    assert needed in str(refusal.value)
    assert "training.batches.batch_size" in str(refusal.value) and "training.model.width" in str(refusal.value)
    assert "workers" not in str(refusal.value)
    document["execution"]["workers"] = 2
    with pytest.raises(UserError, match=r"available for each of 2 workers; lower .* or execution\.workers$"):
        forecasts.fitting_chunk(open_recipe(load_recipe(document)), needs_of(recipe), DEFAULT_CHUNK)


def test_a_run_is_forecast_before_it_starts(document, tmp_path):
    """Jobs are those that the run then does; nothing is written."""
    found = start(load_recipe(document), tmp_path / "run").forecast()
    # the supernet and one batch of two estimates; two pools of two in selection; three models, two seeds each, tested
    assert found.jobs == 1 + 1 + 2 * 2 + 2 * 3 * 2
    assert found.seconds > 0 and found.bytes.keys() == {"train.training", "estimator.training"}
    assert not (tmp_path / "run").exists()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    found = 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        made = function(*arguments, **(settings or {}))
        self.found = max(self.found, *(part.numel() for part in tree_leaves(made) if isinstance(part, torch.Tensor)), 0)
        return made


@pytest.mark.parametrize("elements, rows", [(80, 4), (139, 6), (1, 1), (10_000, 12)])
def test_no_more_logits_are_held_than_were_set(elements, rows):
    """Of 12 predictions over 20 classes, from 2 features; the loss stays the same."""
    noise = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 2, generator=noise), torch.randn(20, 2, generator=noise)
    targets = torch.arange(12)
    with using(chunk=elements), Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, None, targets)
    assert largest.found == max(20 * rows, weight.numel())
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.t(), targets))


def test_seconds_of_work_by_hand(document):
    """Two-node cells of width 4 over 21 words: per token 2 (8 x 8 + 2 x 4 x 8 + 4 x V) operations, forward."""
    recipe = load_recipe(document)
    task = open_task(recipe)
    per_token = 2 * (64 + 64 + 4 * len(task.vocabulary))
    stream = task.stream("train", recipe.train.training.batch_settings(task), 0)
    epoch = 3 * per_token * stream.steps_per_epoch * 40
    # one epoch each: the winner and a random cell, 2 seeds; two pools of two candidates; one pass of shared weights
    total = (2 * 2 + 2 * 2 + 1) * epoch
    assert forecasts.seconds_of_work(*work_of(recipe)) == pytest.approx(total / forecast.PLAIN_FLOPS)


@pytest.mark.parametrize("order, passes", [(1, 2), (2, 5)])
def test_what_a_gradient_learns_is_work_too(document, order, passes):
    """Of the search's part: the weights' pass, and one or four of the architecture step."""
    document["baselines"] = {}
    document["search"]["candidates"] = 1
    document["strategy"] = {"name": "gradient", "order": order}
    recipe = load_recipe(document)
    task, space = open_task(recipe), open_space(recipe)
    model = forecast.on_meta(lambda: task.model(space.supernet(4), ModelSettings(width=4)))
    batch = task.largest_batch(recipe.train.training.batch_settings(task))
    mixture = {"nodes": torch.zeros(3, 5, device="meta")}
    steps = task.stream("train", recipe.train.training.batch_settings(task), 0).steps_per_epoch
    search = 3 * passes * steps * forward_flops(model, batch, mixture)
    path = (
        3
        * steps
        * forward_flops(
            forecast.on_meta(lambda: build_model(task, space.sample(rng(0)), recipe.train.training)), batch, None
        )
    )
    assert forecasts.seconds_of_work(*work_of(recipe)) == pytest.approx((search + 3 * path) / forecast.PLAIN_FLOPS)


# ------------------------------------------------------------------------------------------------- a limit of 4 GiB


def limited(folder, document):
    """A run in a process that may map 4 GiB: (exit code, last line of its errors)."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    command = f"ulimit -v 4194304; exec {sys.executable} -m lmnas search recipe.yaml --run run"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def test_under_a_limit_of_four_gib_a_large_training_is_refused(tmp_path, document):
    """Without the check it would die in the middle; here there is not even a run directory."""
    document["train"]["training"]["batches"].update(batch_size=32, bptt=20)
    document["train"]["training"]["model"]["width"] = 6000
    code, message = limited(tmp_path, document)
    assert code == 2 and not (tmp_path / "run").exists()
    assert message.startswith("lmnas: train.training: needs about") and "are available" in message


@pytest.mark.slow
def test_under_a_limit_of_four_gib_a_small_run_ends_well(tmp_path, document):
    document["baselines"] = {}
    assert limited(tmp_path, document)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("width, code", [(2400, 2), (1000, 0)])
def test_under_a_limit_of_four_gib_what_is_admitted_does_not_die(tmp_path, document, width, code):
    """A model of 80 MB of weights trains to the end; one of 460 MB is refused."""
    document = {**document, "baselines": {}, "genotype": "darts-v2", "space": {"name": "recurrent-cell"}}
    document["train"] = {"seeds": 1, "training": tiny.training(batches={"batch_size": 16, "bptt": 20})}
    document["train"]["training"]["model"]["width"] = width
    ended, message = limited(tmp_path, document)
    assert ended == code, message
    assert code == 0 or "needs about" in message

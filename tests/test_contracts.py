"""What every space, strategy, estimator and task promises. Joining the registry means being tested here.

The tests take names of the registry, and `text` the path of a small text, so that other tests can call them for
components of their own (`test_adding`).
"""

import copy
import itertools
import json
import math
import random
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

from lmnas.core import registry
from lmnas.core.capabilities import Example, lacking
from lmnas.core.checkpoints import pack, unpack
from lmnas.core.contracts import LearnStep, Objective, Proposal, Relaxed, SharingStrategy
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.core.nests import map_tensors
from lmnas.core.seeds import generator
from lmnas.core.settings import settings_model
from lmnas.nn.train import initialise
from lmnas.runs.build import covering_space

OBJECTIVE = Objective("error", "", "minimize")
CPU = torch.device("cpu")
T, B, H = 7, 3, 6
PIXELS = 8
RATES = {"x": 0.5, "hidden": 0.5, "weight": 0.5, "path": 0.5}
ENAS = {"n_nodes": 5, "input_activation": "searched", "output": "loose-ends", "sharing": "edge"}
SIZES = {"width": H, "batch_size": B, "bptt": 7, "eval_batch_size": 2, "test_batch_size": 2}
"""What models and batches may ask for; each task takes those that it has."""
SMALL = {"darts-conv": {"cells": 3}, "enas-macro": {"layers": 4}, "enas-micro": {"cells": 4}}
"""Depth as it is tested; `covering` builds at the default one."""
SPACES = [
    *((name, SMALL.get(name, {})) for name in registry.names("space")),
    ("recurrent-cell", ENAS),
    ("flexibert", {"form": "reduced"}),
]

every_space = pytest.mark.parametrize("name, settings", SPACES)
RELAXED = [(name, settings) for name, settings in SPACES if issubclass(registry.component("space", name), Relaxed)]
every_relaxed_space = pytest.mark.parametrize("name, settings", RELAXED)
every_strategy = pytest.mark.parametrize("name", registry.names("strategy"))
every_estimator = pytest.mark.parametrize("name", registry.names("estimator"))
every_task = pytest.mark.parametrize("name", registry.names("task"))


@pytest.fixture(scope="module")
def text(tmp_path_factory, cache):
    path = tmp_path_factory.mktemp("contracts") / "text.txt"
    path.write_text(tiny.text(60))
    return path


def known(kind, name, settings):
    """Those of `settings` that the component has."""
    fields = settings_model(registry.component(kind, name)).model_fields
    return {key: value for key, value in settings.items() if key in fields}


def make_space(name, **settings):
    # norms that are the supernet's alone are left out, so that outputs can be compared
    alone = known("space", name, {"batch_norm": "none", "pool_norm": "never"})
    return registry.create("space", {"name": name, **alone, **settings})


def make_task(name, text):
    """On the small text, or on small pictures beside it."""
    data = text
    if "image" in registry.component("task", name).takes:
        data = text.parent / "pictures"
        if not data.is_dir():
            tiny.pictures(data, n_train=8, n_valid=3, size=PIXELS)
    return registry.create("task", {"name": name, **known("task", name, {"data": str(data)})})


def new_data(task, text):
    """What a user of the trained model would have it score."""
    return str(text.parent / "pictures" / "test") if "image" in task.takes else tiny.text(2)


def settings_for(target):
    return target(**{key: value for key, value in SIZES.items() if key in target.__dataclass_fields__})


def samples(space, n):
    return [space.sample(random.Random(seed)) for seed in range(n)]


def make_body(space, genotype, seed=0):
    body = space.build(genotype, H)
    body.initialise(generator(seed, "init"), 0.5)
    return body.double()


def segment(seed=0, time=T):
    return torch.randn(time, B, H, generator=generator(seed, "inputs"), dtype=torch.float64)


def example(space, n_features=H):
    return Example.of(space.makes, H, n_features, B, PIXELS)


def inputs_for(space):
    return example(space).draw(generator(0, "inputs"))


def each_part(state, function):
    """Of a carried state: None, a tensor or a tuple of them."""
    if isinstance(state, tuple):
        return tuple(each_part(part, function) for part in state)
    return None if state is None else function(state)


def zero_state(body):
    """What a segment begins with, in the body's precision."""
    return each_part(body.initial_state(B), lambda part: part.double())


def some_state(body):
    """Not the initial state: a gated graph may stay at zero for ever."""
    noise = generator(0, "state")
    return each_part(body.initial_state(B), lambda part: torch.randn(part.shape, generator=noise, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------ spaces


@every_space
def test_genotypes_are_values_of_the_space(name, settings):
    space = make_space(name, **settings)
    assert space.name == name
    for seed, genotype in enumerate(samples(space, 20)):
        assert genotype == space.sample(random.Random(seed))
        assert genotype.space == name
        space.check(genotype)
        mutant = space.mutate(genotype, random.Random(seed))
        space.check(mutant)
        assert mutant == space.mutate(genotype, random.Random(seed))
        assert mutant != genotype or space.decisions.size() == 1
        assert Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))) == genotype
        assert len(space.decisions.encode(genotype.choices)) == len(space.decisions.encode(mutant.choices))
    with pytest.raises(UserError):
        space.check(Genotype("another-space", genotype.choices))
    with pytest.raises(UserError):
        space.check(Genotype(name, {**genotype.choices, "no such decision": 1}))


@every_space
def test_covering_builds_the_same_from_the_genotype_alone(name, settings):
    depth = SMALL.get(name, {})
    space = make_space(name, **{key: value for key, value in settings.items() if key not in depth})
    for genotype in samples(space, 2 if depth else 5):
        first, second = make_body(space, genotype), make_body(covering_space(genotype), genotype)
        inputs = inputs_for(space)
        found = first(inputs, zero_state(first), {})[0]
        assert found.isfinite().all()
        assert torch.equal(found, second(inputs, zero_state(second), {})[0])


@every_space
def test_diagrams_are_whole(name, settings):
    space = make_space(name, **settings)
    for genotype in samples(space, 5):
        diagram = space.diagram(genotype)
        keys = [key for key, _, _ in diagram.nodes]
        assert diagram.title and len(set(keys)) == len(keys)
        assert {kind for _, _, kind in diagram.nodes} == {"input", "op", "output"}
        assert {end for start, stop, _ in diagram.edges for end in (start, stop)} == set(keys)


@every_space
def test_a_body_gives_the_features_that_it_says(name, settings):
    space = make_space(name, **settings)
    for genotype in samples(space, 3):
        body, inputs = make_body(space, genotype), inputs_for(space)
        outputs = body(inputs, zero_state(body), {})[0]
        assert body.width == H and outputs.isfinite().all()
        assert outputs.shape == example(space, body.n_features).outputs
        if "image" in space.makes:
            features, auxiliary = body.maps(inputs, {})
            assert torch.equal(outputs, features) and auxiliary.shape[:2] == (B, body.auxiliary_channels)


@every_space
def test_a_causal_body_reads_no_later_input(name, settings):
    """Others read it: what a space says of itself is true."""
    space = make_space(name, **settings)
    if "sequence" not in space.makes:
        pytest.skip(f"space {name!r} makes no sequence bodies")
    body, inputs = make_body(space, samples(space, 1)[0]), inputs_for(space)
    later = inputs.clone()
    later[T:] += 1.0
    first, second = (body(i, zero_state(body), {})[0][:T] for i in (inputs, later))
    assert torch.equal(first, second) == ("causal" in space.makes) == ("bidirectional" not in space.makes)


@every_space
def test_a_stateful_body_carries_its_state(name, settings):
    space = make_space(name, **settings)
    if "stateful" not in space.makes:
        pytest.skip(f"space {name!r} makes no stateful bodies")
    for genotype in samples(space, 3):
        body, inputs = make_body(space, genotype), segment(time=2 * T)
        assert body.width == H
        whole, last = body(inputs, body.initial_state(B), {})
        assert whole.shape == inputs.shape and torch.isfinite(whole).all()
        first, state = body(inputs[:T], body.initial_state(B), {})
        second, state = body(inputs[T:], state, {})
        torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(state, last, rtol=0, atol=1e-12)
        whole.square().sum().backward()
        assert all(parameter.grad is not None for parameter in body.parameters())


@every_space
def test_weights_and_masks_come_from_the_generator_alone(name, settings):
    space = make_space(name, **settings)
    genotype = space.sample(random.Random(0))
    body, twin, other = make_body(space, genotype), make_body(space, genotype), make_body(space, genotype, seed=1)
    weights = list(zip(body.parameters(), twin.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in weights)
    assert not all(torch.equal(a, c) for a, _, c in weights)
    assert not body.draw_masks(B, dict.fromkeys(RATES, 0.0), generator(0))
    masks, again = (body.draw_masks(B, RATES, generator(0, "masks")) for _ in range(2))
    assert masks and masks.keys() == again.keys()
    assert all(torch.equal(masks[key], again[key]) for key in masks)
    # already over the keep probability, which may be more than a half in earlier layers
    kept = [set(mask.unique().tolist()) - {0.0} for mask in masks.values()]
    assert all(len(values) <= 1 and max(values, default=2.0) <= 2.0 for values in kept)
    assert max(max(values, default=1.0) for values in kept) == 2.0
    state, inputs = some_state(body), inputs_for(space)
    dropped, plain = (body(inputs, state, m)[0] for m in (masks, {}))
    assert not torch.equal(dropped, plain)
    assert torch.equal(dropped, body(inputs, state, again)[0])


def make_supernet(space):
    net = space.supernet(H)
    net.initialise(generator(0, "init"), 0.5)
    return net.double()


@every_relaxed_space
def test_a_path_of_the_supernet_is_the_stand_alone_body(name, settings):
    space = make_space(name, **settings)
    net = make_supernet(space)
    for genotype in samples(space, 10):
        body = space.build(genotype, H).double()
        body.load_state_dict(net.inherit(genotype))
        masks = body.draw_masks(B, RATES, generator(0, "masks"))
        state, inputs = body.initial_state(B), inputs_for(space)
        (expected, last), (found, found_last) = body(inputs, state, masks), net(inputs, state, masks, genotype)
        columns = list(net.columns(genotype))
        assert found.count_nonzero() == found[..., columns].count_nonzero()
        found = found[..., columns]
        assert torch.equal(expected, found)
        assert (last is found_last is None) or torch.equal(last, found_last)


def one_hot(space, rng):
    """A mixture that reads as many edges into every node as an architecture keeps, with one operation each."""
    mixture = {}
    for table in space.tables():
        weights = torch.zeros(len(table.edges), len(table.ops), dtype=torch.float64)
        operations = [column for column, op in enumerate(table.ops) if op != "none"]
        for _, rows in itertools.groupby(range(len(table.edges)), key=lambda row: table.edges[row][0]):
            for row in rng.sample(list(rows), table.inputs):
                weights[row, rng.choice(operations)] = 1.0
        mixture[table.name] = weights
    return mixture


@every_relaxed_space
def test_a_one_hot_mixture_is_the_path_that_it_derives(name, settings):
    space = make_space(name, **settings)
    net, derived = make_supernet(space), set()
    for seed in range(10):
        mixture = one_hot(space, random.Random(seed))
        genotype = space.derive(mixture)
        space.check(genotype)
        assert genotype == space.derive({key: 0.3 * table for key, table in mixture.items()})
        soft = net(inputs_for(space), net.initial_state(B), {}, mixture)[0]
        hard = net(inputs_for(space), net.initial_state(B), {}, genotype)[0]
        torch.testing.assert_close(soft, hard, rtol=0, atol=1e-10)
        derived.add(genotype)
    assert len(derived) > 5


@every_relaxed_space
def test_the_relaxation_has_gradients(name, settings):
    space = make_space(name, **settings)
    net = make_supernet(space)
    mixture = {
        table.name: torch.full((len(table.edges), len(table.ops)), 1 / len(table.ops), dtype=torch.float64)
        for table in space.tables()
    }
    leaves = [table.requires_grad_() for table in mixture.values()]
    out = net(inputs_for(space), net.initial_state(B), {}, mixture)[0]
    assert out.shape == example(space, net.n_features).outputs
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), leaves))


# -------------------------------------------------------------------------------------------------------- strategies


REFUSED = {
    ("reinforce", "recurrent-graph"): "states no decisions for a controller",
    ("bayes", "darts-conv"): "batch norms",
    ("bayes", "enas-macro"): "batch norms",
    ("bayes", "enas-micro"): "batch norms",
    ("bayes", "recurrent-cell", "loose-ends"): "space.output 'loose-ends'",
}
"""(strategy, space, its output if set) -> why that strategy cannot search a space which has all that it takes."""


def strategies_on_spaces(name, seed=0):
    """(space, a function that makes the strategy) for every space the strategy can search: one at least.

    That is every space with what it takes and needs, but for those in `REFUSED`; the others it refuses.
    """
    strategy, made = registry.component("strategy", name), []
    section = {"name": name, **known("strategy", name, {"hidden": 8})}
    for space_name, settings in SPACES:
        space = make_space(space_name, **settings)
        reason = REFUSED.get((name, space_name, *([settings["output"]] if "output" in settings else [])))
        if "mixture" in strategy.needs and not isinstance(space, Relaxed):
            reason = "needs a space with a relaxation"
        if not strategy.takes <= space.makes:
            continue  # refused before it is made
        make = partial(registry.create, "strategy", section, space, OBJECTIVE)
        if reason is None:
            make(seed)  # now, as a test may stop at the first space
            made.append((space, lambda seed=seed, make=make: make(seed)))
        else:
            with pytest.raises(UserError, match=reason):
                make(seed)
    assert made, f"strategy {name!r} refuses every space"
    return made


def value(genotype):
    """An arbitrary score that depends on the architecture alone."""
    return 1.0 + int(genotype.id, 16) % 1000 / 1000


def told(strategy, proposals):
    genotypes = [proposal.genotype for proposal in proposals]
    values = [None if int(g.id, 16) % 5 == 0 else value(g) for g in genotypes]
    strategy.tell([tiny.trial(p, v, number) for number, (p, v) in enumerate(zip(proposals, values, strict=True))])


def learn(strategy, step):
    """One step of a toy with one weight, where every table has a best column."""
    weights = {"w": torch.tensor([1.5], requires_grad=True)}

    def loss(weights, mixture):
        return (
            sum((table * torch.arange(table.numel()).view_as(table)).sum() for table in mixture.values())
            * weights["w"].square().sum()
        )

    def curvature(mixture, method, n_batches):
        return {name: torch.full_like(table, 100.0) for name, table in mixture.items()}

    strategy.learn(
        LearnStep(
            step,
            loss,
            loss,
            weights,
            learning_rate=0.1,
            weight_decay=0.0,
            clip=0.25,
            progress=min(1.0, (step + 1) / 5),
            curvature=curvature,
        )
    )


@every_strategy
def test_its_needs_are_met_by_some_estimator(name):
    needs = registry.component("strategy", name).needs
    assert isinstance(needs, frozenset)
    assert any(needs <= registry.component("estimator", other).provides for other in registry.names("estimator"))


@every_strategy
def test_proposals_repeat_with_the_seed(name):
    searched = 0
    for space, make in strategies_on_spaces(name):
        together, one_by_one = make(), make()
        proposed = together.ask(6)
        assert proposed == [proposal for _ in range(6) for proposal in one_by_one.ask(1)]
        assert all(space.check(proposal.genotype) is None for proposal in proposed)
        assert together.ask(0) == []
        searched += bool(proposed)
    assert searched


@every_strategy
def test_other_seeds_propose_otherwise(name):
    assert any(make(0).ask(3) != make(1).ask(3) for _, make in strategies_on_spaces(name))


@every_strategy
def test_its_state_survives_a_checkpoint(name):
    for _, make in strategies_on_spaces(name):
        strategy = make()
        for step in range(3):
            told(strategy, strategy.ask(2) if step < 2 else [])
            if "mixture" in strategy.needs:
                learn(strategy, step)
        continued = make()
        continued.load_state_dict(unpack(pack(strategy.state_dict())))
        for step in range(3, 6):
            if "mixture" in strategy.needs:
                learn(strategy, step), learn(continued, step)
            asked = strategy.ask(2)
            assert continued.ask(2) == asked
            told(strategy, asked), told(continued, asked)
        assert pack(continued.state_dict()) == pack(strategy.state_dict())


@every_strategy
def test_loading_a_state_does_not_tie_two_strategies(name):
    for _, make in strategies_on_spaces(name):
        strategy, continued = make(), make()
        state = strategy.state_dict()
        before = copy.deepcopy(state)
        continued.load_state_dict(state)
        told(continued, continued.ask(2))
        assert pack(strategy.state_dict()) == pack(before)


@every_strategy
def test_a_sharing_strategy_steers_by_step(name):
    if not issubclass(registry.component("strategy", name), SharingStrategy):
        pytest.skip("black-box: it cannot steer shared weights, and is refused there")
    for space, make in strategies_on_spaces(name):
        strategy = make()
        for step in (0, 7):
            choice, again = strategy.choice(step), make().choice(step)
            if isinstance(choice, Genotype):
                space.check(choice)
                assert choice == again
            else:
                assert {t.name: (len(t.edges), len(t.ops)) for t in space.tables()} == {
                    key: tuple(table.shape) for key, table in choice.items()
                }
                assert all(torch.equal(table, again[key]) for key, table in choice.items())
        assert strategy.rewards_per_round >= 0 and strategy.rewards_per_update >= 1
        told(strategy, strategy.ask(2))
        assert isinstance(json.loads(json.dumps(strategy.statistics(), allow_nan=False)), dict)


# -------------------------------------------------------------------------------------------------------- estimators


def make_estimator(name, space, task, table=None):
    training = {"epochs": 1, "model": SIZES, "batches": SIZES}
    training["model"] = {k: v for k, v in SIZES.items() if k in task.model_settings.__dataclass_fields__}
    training["batches"] = {k: v for k, v in SIZES.items() if k in task.batch_settings.__dataclass_fields__}
    section = {"name": name, **known("estimator", name, {"training": training, "data": str(table)})}
    return registry.create("estimator", section, space, task, 0, CPU)


@every_estimator
def test_scores_are_finite_and_repeat(name, text, tmp_path):
    task, space = make_task("language-modeling", text), make_space("recurrent-cell", n_nodes=2)
    looked_up = name == "table"
    if looked_up:
        space = make_space("recurrent-graph")
    genotypes, values = samples(space, 2), []
    table = tmp_path / "table.jsonl"
    with open(table, "w") as file:
        for k, genotype in enumerate(genotypes):
            ptb = {"runs": [{"test_loss": 4.5 + k}]}
            file.write(json.dumps({"id": k, "group": "", "recipe": dict(genotype.choices), "ptb": ptb}) + "\n")
    for attempt in range(2):
        estimator = make_estimator(name, space, task, table)
        assert isinstance(estimator.provides, frozenset)
        assert isinstance(estimator.is_proxy, bool) and isinstance(estimator.is_cheap, bool)
        preparing = Job(tmp_path / f"prepare-{attempt}")
        estimator.prepare(registry.create("strategy", {"name": "random"}, space, task.objective, 0), preparing)
        fresh = make_estimator(name, space, task, table)  # estimates may be made in another process
        fresh.load(preparing.directory)
        scores = [fresh.estimate(Proposal(g), 0, Job(tmp_path / f"{attempt}-{i}")) for i, g in enumerate(genotypes)]
        assert all(math.isfinite(s.value) for s in scores)
        # others trained and tested what is looked up, and do not say on how many tokens
        assert all(
            (s.split, s.n_predictions > 0) == (("test", False) if looked_up else ("valid", True)) for s in scores
        )
        values.append([s.value for s in scores])
    assert values[0] == values[1]


# ------------------------------------------------------------------------------------------------------------- tasks


def make_model(task):
    """A model of the task around the first body that it can wrap."""
    for space_name in registry.names("space"):
        space = make_space(space_name)
        if not lacking(task.takes, space.makes):
            body = space.build(space.sample(random.Random(0)), H)
            return initialise(task.model(body, settings_for(task.model_settings)), 0)
    raise AssertionError(f"no space makes bodies for task {task.name!r}")


@every_task
def test_its_data_are_described(name, text):
    task = make_task(name, text)
    assert task.name == name
    assert task.objective.direction in ("minimize", "maximize") and task.objective.name and task.objective.unit
    described = json.loads(json.dumps(task.data()))
    assert described.keys() >= {"name", "fingerprint"}
    assert described == json.loads(json.dumps(make_task(name, text).data()))


@every_task
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_stream_continues_from_its_state(name, text, split):
    task = make_task(name, text)
    batches = settings_for(task.batch_settings)
    stream, restored = task.stream(split, batches, 3), task.stream(split, batches, 3)
    for _ in range(2):
        stream.next()
    restored.load_state_dict(unpack(pack(stream.state_dict())))
    for _ in range(3 * stream.steps_per_epoch):  # over the ends of passes
        first, second = stream.next(), restored.next()
        assert pack({"": [first.inputs, first.targets]}) == pack({"": [second.inputs, second.targets]})
        assert first.scale == second.scale and stream.epoch == restored.epoch
    assert stream.epoch >= 2


@every_task
def test_its_model_learns_from_a_batch(name, text):
    task = make_task(name, text)
    model, batch = make_model(task), task.stream("train", settings_for(task.batch_settings), 0).next()
    masks = model.draw_masks(batch, generator(0))
    loss, state = model(batch, masks)
    assert loss.ndim == 0 and math.isfinite(loss.item())
    map_tensors(lambda part: pytest.fail("the state has a history") if part.requires_grad else part, state)
    before = loss.item()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    assert model(batch, masks)[0].item() < before


@every_task
def test_evaluation_repeats_and_leaves_the_model_alone(name, text):
    task = make_task(name, text)
    model, batches, done = make_model(task), settings_for(task.batch_settings), []
    before = pack(model.state_dict())
    for split in ("valid", "test"):
        first, second = (task.evaluate(model, split, batches, tick=done.append) for _ in range(2))
        assert first == second and first.split == split and math.isfinite(first.value)
        assert task.evaluate(model, split, batches, max_segments=1).n_predictions < first.n_predictions
    assert done and max(done) == pytest.approx(1.0) and all(0 <= fraction <= 1 for fraction in done)
    batch = task.stream("valid", batches, 0).next()
    assert task.score_batch(model, batch) == task.score_batch(model, replace(batch, state=None, scale=1.0))
    assert pack(model.state_dict()) == before


@every_task
def test_it_hands_over_what_a_user_needs(name, text, tmp_path):
    task = make_task(name, text)
    task.save_assets(tmp_path)
    assert list(tmp_path.iterdir())
    assert math.isfinite(task.score_text(make_model(task), new_data(task, text)).value)

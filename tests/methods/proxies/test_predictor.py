import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator
from lmnas.methods.proxies.predictor import (
    GRID,
    LINEAR,
    PRIOR,
    SHIPPED,
    WARM_UP,
    Predictor,
    dynamics,
    features,
    memory,
    prior,
    shipped,
    structure,
)
from lmnas.methods.proxies.statistics import Undefined
from lmnas.spaces.recurrent.graph import RecurrentGraph

TABLE = Path(os.environ.get("LMNAS_DATA", "data")) / "nas-bench-nlp" / "architectures.jsonl"
SPACE = RecurrentGraph(direct_memory=True)


def cell(name):
    return load_genotype(f"nas-bench-nlp-{name}")


def test_memory_of_a_delay_line():
    """States that hold the inputs of now and of two steps ago, and nothing else."""
    inputs = torch.randn(WARM_UP + 60, 40, 2, generator=generator(0, "inputs"))
    states = torch.cat([inputs, inputs.roll(2, dims=0)], dim=-1)
    found = memory(states, inputs, (0, 1, 2, 4))
    assert found[0] == pytest.approx(1.0, abs=1e-4) and found[2] == pytest.approx(1.0, abs=1e-4)
    assert max(found[1], found[3]) < 0.01
    half = memory(states[..., :3], inputs, (2,))[0]  # one of two numbers is gone
    assert half == pytest.approx(0.5, abs=0.03)
    with pytest.raises(Undefined):
        memory(states * math.nan, inputs, (0,))


def test_dynamics_depend_on_the_graph_and_the_seed_alone():
    first, again, other = (features(SPACE, cell("lstm"), seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(math.isfinite(value) for value in first.values())
    assert set(PRIOR) <= set(first) and list(first) == shipped().names


def test_memory_and_gradients_fade_with_the_lag():
    for name in ("rnn", "gru", "lstm"):
        found = dynamics(lambda width, layers, name=name: SPACE.stack(cell(name), width, layers))
        for layer in (1, 2, 3):
            assert found[f"memory_1_{layer}"] > found[f"memory_8_{layer}"]
        assert found["gradient_1"] > found["gradient_8"] > found["gradient_32"]


def test_a_cell_that_explodes_has_no_features_but_a_score():
    def build(width, layers):
        body = SPACE.stack(cell("rnn"), width, layers)
        body.initialise = lambda draws, init_range: [torch.nn.init.constant_(p, math.nan) for p in body.parameters()]
        return body

    found = {**dynamics(build), **structure(cell("rnn").choices)}
    assert math.isnan(found["hidden_covariance_1"]) and math.isnan(found["gradient_2"])
    fine = features(SPACE, cell("rnn"))
    assert prior(found) < prior(fine)
    assert np.isfinite(shipped().predict([found, fine])).all()


def test_structure_of_the_gru():
    found = structure(cell("gru").choices)
    assert found["states"] == 1 and found["nodes"] == 8
    assert found["count_linear"] == 3 and found["count_activation_sigm"] == 2 and found["count_blend"] == 1
    assert found["output_blend"] == 1 and found["output_linear"] == 0
    assert found["feeds_activation_sigm"] == 1 and found["feeds_activation_tanh"] == 1
    assert (found["way_x"], found["way_h"], found["way_any"]) == (3, 1, 1)  # x, linear, sigmoid, blend
    assert found["skips"] == found["own_skips"] == found["self_reading"] == 1
    lstm = structure(cell("lstm").choices)
    assert lstm["skips"] == 1 and lstm["own_skips"] == 1  # c' to c, through a product and a sum


def test_kernel_ridge_is_the_textbook_solution():
    draws = np.random.default_rng(0)
    cells = [{"a": float(a), "b": float(b)} for a, b in draws.normal(size=(30, 2))]
    losses = [c["a"] ** 2 + 0.1 * c["b"] for c in cells]
    model = Predictor.fit(cells, losses, np.zeros(2), np.ones(2))
    x = np.clip([[c["a"], c["b"]] for c in cells], -3, 3)
    gram = np.exp(-model.gamma * ((x[:, None] - x[None]) ** 2).mean(-1)) + LINEAR * x @ x.T / 2
    ranks = 1 - (stats.rankdata(losses) - 0.5) / 30
    penalties = sorted({penalty for penalty, _ in GRID})
    solutions = [np.linalg.solve(gram + p * np.eye(30), ranks - 0.5) for p in penalties]
    assert any(np.allclose(model.weights, solution) for solution in solutions)
    # leaving out and fitting again, at the chosen gamma, is what chose the penalty
    errors = []
    for penalty in penalties:
        missed = []
        for i in range(30):
            rest = [j for j in range(30) if j != i]
            weights = np.linalg.solve(gram[np.ix_(rest, rest)] + penalty * np.eye(29), ranks[rest] - 0.5)
            missed.append(ranks[i] - 0.5 - gram[i, rest] @ weights)
        errors.append(np.square(missed).mean())
    chosen = next(k for k, solution in enumerate(solutions) if np.allclose(model.weights, solution))
    assert chosen == int(np.argmin(errors))
    unseen = [{"a": 2.5, "b": 0.0}, {"a": 0.0, "b": 0.0}]
    assert model.predict(unseen)[0] < model.predict(unseen)[1]
    copy = Predictor.from_document(json.loads(json.dumps(model.document())))
    assert np.allclose(copy.predict(unseen), model.predict(unseen), atol=0.02)


def test_the_shipped_predictor_says_where_it_is_from():
    provenance = json.loads(SHIPPED.read_text())["provenance"]
    assert len(provenance["trained_cells"]) == len(shipped().cells) == len(set(provenance["groups"])) == 100


@pytest.mark.skipif(not TABLE.is_file(), reason="the NAS-Bench-NLP table is not in LMNAS_DATA")
def test_the_predictors_rank_unseen_cells():
    """60 cells: τ has a standard error of about 0.08; the bars leave three."""
    seen = set(json.loads(SHIPPED.read_text())["provenance"]["groups"])
    entries = [entry for entry in map(json.loads, TABLE.read_text().splitlines()) if entry["group"] not in seen]
    entries = random.Random(0).sample([entry for entry in entries if entry["ptb"]["test_loss_mean"]], 60)
    cells = [features(SPACE, SPACE.canonical(Genotype(SPACE.name, entry["recipe"]))) for entry in entries]
    losses = [-entry["ptb"]["test_loss_mean"] for entry in entries]
    assert stats.kendalltau(shipped().predict(cells), losses).statistic > 0.38
    assert stats.kendalltau([prior(c) for c in cells], losses).statistic > 0.26

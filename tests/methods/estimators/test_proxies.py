"""Training-free estimators: the metric itself, turned to the objective, and failures that say why."""

import random

import pytest
import torch

from lmnas.core import registry
from lmnas.core.contracts import Objective, Proposal
from lmnas.core.errors import Diverged, Unscored, UserError
from lmnas.core.genotype import Genotype
from lmnas.core.job import Job
from lmnas.methods.estimators.proxies import HiddenCovariance, Proxy
from lmnas.methods.proxies import transformer
from lmnas.methods.proxies.predictor import features, prior, shipped
from lmnas.methods.proxies.recurrent import METRICS, measure
from lmnas.nn.train import initialise
from lmnas.nn.training.settings import Training
from lmnas.spaces.recurrent.graph import RecurrentGraph
from lmnas.spaces.recurrent.layers import LSTM
from lmnas.spaces.transformer.flexibert import FlexiBERT

CPU = torch.device("cpu")
TRAINING = Training(epochs=1, model={"width": 8}, batches={"batch_size": 4, "bptt": 9})
SPACE = RecurrentGraph()
DEAD = Genotype(
    "recurrent-graph",
    {
        "a": {"op": "linear", "input": ["x", "h_prev_0"]},
        "b": {"op": "elementwise_prod", "input": ["a", "h_prev_0"]},
        "h_new_0": {"op": "elementwise_prod", "input": ["a", "b"]},
    },
)


def estimator(task, space=SPACE, **settings):
    return Proxy(space, task, 0, CPU, training=TRAINING, **settings)


@pytest.mark.parametrize("metric", ["hidden_covariance_1", "hidden_saliency", "jacobian_cosine"])
def test_it_is_the_metric_of_the_untrained_model(metric, tiny_task, tmp_path):
    genotype = SPACE.sample(random.Random(3))
    score = estimator(tiny_task, metric=metric).estimate(Proposal(genotype), 5, Job(tmp_path))
    settings = tiny_task.model_settings(width=8)
    model = initialise(tiny_task.model(SPACE.build(genotype, 8), settings), 5)
    tokens = tiny_task.stream("valid", tiny_task.batch_settings(batch_size=4, bptt=9), 5).next().inputs
    expected = measure(model.body, model.embedding, tokens, [metric], 5)[metric]
    # the task's perplexity is minimised, so a good candidate has a low value
    assert score.value == pytest.approx(-METRICS[metric].sign * expected, rel=1e-6)
    assert (score.split, score.n_predictions) == ("valid", 36)


def test_it_follows_an_objective_that_is_maximised(tiny_task, tmp_path, monkeypatch):
    genotype = SPACE.sample(random.Random(3))
    low = estimator(tiny_task).estimate(Proposal(genotype), 0, Job(tmp_path)).value
    monkeypatch.setattr(tiny_task, "objective", Objective("accuracy", "of tags", "maximize"))
    assert estimator(tiny_task).estimate(Proposal(genotype), 0, Job(tmp_path)).value == -low


def test_hidden_covariance_is_a_name_of_its_own(tiny_task, tmp_path):
    genotype = SPACE.sample(random.Random(3))
    own = HiddenCovariance(SPACE, tiny_task, 0, CPU, training=TRAINING).estimate(Proposal(genotype), 0, Job(tmp_path))
    assert own == estimator(tiny_task, metric="hidden_covariance_1").estimate(Proposal(genotype), 0, Job(tmp_path))
    assert registry.component("estimator", "hidden-covariance").is_proxy


def test_predictors_ignore_the_model(tiny_task, tmp_path):
    genotype = SPACE.sample(random.Random(3))
    cell = features(SPACE, genotype)
    found = {
        m: estimator(tiny_task, metric=m).estimate(Proposal(genotype), 0, Job(tmp_path)).value
        for m in ("predictor", "prior")
    }
    assert found["prior"] == pytest.approx(-prior(cell))
    assert found["predictor"] == pytest.approx(-shipped().predict([cell])[0])


def test_an_undefined_score_is_a_failed_trial_with_its_reason(tiny_task, tmp_path):
    with pytest.raises(Unscored) as failure:
        estimator(tiny_task).estimate(Proposal(DEAD), 0, Job(tmp_path))
    assert str(failure.value) == "hidden_covariance_1 is undefined: 8 of 8 rows are constant"
    assert isinstance(failure.value, Diverged)  # jobs record it as they record a divergence


def test_what_does_not_fit_is_refused(tiny_task):
    with pytest.raises(UserError, match=r"hidden_covariance_7.*hidden_covariance_"):
        estimator(tiny_task, metric="hidden_covariance_7")
    with pytest.raises(
        UserError,
        match="'predictor' takes causal stateful graph sequence bodies; space 'lstm'",
    ):
        estimator(tiny_task, space=LSTM(), metric="predictor")


def test_transformer_bodies(tiny_task, tmp_path, monkeypatch):
    """Their metrics by the same estimator, for a task that wraps them."""
    space = FlexiBERT(hidden=(8,), feed_forward=(16,), layers=(2,))
    monkeypatch.setattr(tiny_task, "takes", frozenset({"sequence"}), raising=False)
    genotype = space.sample(random.Random(0))
    found = estimator(tiny_task, space=space, metric="w_pca").estimate(Proposal(genotype), 2, Job(tmp_path)).value
    network = transformer.untrained(space.build(genotype, 8), len(tiny_task.vocabulary), 2)
    tokens = tiny_task.stream("valid", tiny_task.batch_settings(batch_size=4, bptt=9), 2).next().inputs
    assert found == -transformer.measure(network, tokens.t(), ["w_pca"], 2)["w_pca"]
    with pytest.raises(
        UserError,
        match=r"hidden_covariance_1' takes causal stateful sequence bodies; space 'flex",
    ):
        estimator(tiny_task, space=space)

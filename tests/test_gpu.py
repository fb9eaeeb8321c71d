"""What only a GPU runs, beside the CPU's answer. Skipped where there is none."""

import pytest
import torch

from lmnas.core.events import read_events
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.methods.estimators.shared import Shared
from lmnas.methods.strategies.gradient import Gradient
from lmnas.nn.train import fit, initialise
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.runs.build import build_model
from lmnas.spaces.recurrent.cell import RecurrentCell

pytestmark = pytest.mark.gpu


@pytest.fixture
def on():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device("cuda")


def settings(epochs=2):
    return Training(
        epochs=epochs,
        model={"width": 8, "dropout_output": 0.2, "dropout_hidden": 0.2, "dropout_embedding": 0.1},
        batches={"batch_size": 6, "bptt": 8},
        optimizer=Optimizer(learning_rate=5.0),
        checkpoint_steps=7,
    )


def test_training_follows_the_cpu(on, tiny_task, tmp_path):
    """Masks are drawn on the CPU for every device, so the curves agree to rounding."""
    curves = []
    for number, device in enumerate((torch.device("cpu"), on)):
        training = settings()
        model = initialise(build_model(tiny_task, load_genotype("darts-v1"), training), 0).to(device)
        fit(model, tiny_task, training, 0, Job(tmp_path / str(number)), device)
        curves.append(
            [e["valid"] for e in read_events(tmp_path / str(number) / "events.jsonl") if e["event"] == "epoch"]
        )
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_gradient_search_follows_the_cpu(on, order, tiny_task, tmp_path):
    """Architecture weights live on the CPU, the supernet on the device: the same alphas up to rounding."""
    alphas = []
    for number, device in enumerate((torch.device("cpu"), on)):
        space = RecurrentCell(n_nodes=2)
        estimator = Shared(space, tiny_task, 0, device, training=settings(1))
        strategy = Gradient(space, tiny_task.objective, 0, order=order)
        estimator.prepare(strategy, Job(tmp_path / str(number)))
        alphas.append(strategy.alphas["nodes"].detach())
    torch.testing.assert_close(alphas[1], alphas[0], rtol=0.05, atol=0.01)

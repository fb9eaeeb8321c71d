"""The frame of a training: where it goes back to, with which noise, and when it gives up."""

import pytest
import torch

from lmnas.core.errors import Diverged, NotFinite
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.nn.train import initialise
from lmnas.nn.training.loop import MAX_RECOVERIES, Loop
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.nn.training.weights import WeightTraining
from lmnas.runs.build import build_model


def test_recovery_goes_back_with_fresh_noise_and_gives_up(tiny_task, tmp_path):
    settings = Training(
        epochs=2,
        model={"width": 8, "dropout_output": 0.5},
        batches={"batch_size": 8, "bptt": 8},
        optimizer=Optimizer(learning_rate=1.0),
    )
    model = initialise(build_model(tiny_task, load_genotype("darts-v1"), settings), 0)
    weights = WeightTraining(model, tiny_task, settings, 0, torch.device("cpu"))
    loop = Loop(Job(tmp_path), weights, settings.checkpoint_steps)
    loop.start()
    batch = weights.draw()
    before = weights.masks("weights", batch)["output"]
    weights.update(batch)
    for number in range(1, MAX_RECOVERIES + 1):
        loop.recover(NotFinite("loss is not finite"))
        assert (weights.steps, weights.salt, loop.recoveries) == (0, number, number)
        masks = weights.masks("weights", weights.draw())["output"]
        assert not torch.equal(masks, before)
        before = masks
    with pytest.raises(Diverged, match=f"after {MAX_RECOVERIES} recoveries"):
        loop.recover(NotFinite("loss is not finite"))

"""Schedules against torch.optim.lr_scheduler, or against their papers' formulas."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from lmnas.core import registry
from lmnas.nn.training.schedules import Moment, warmup
from lmnas.nn.training.settings import Optimizer

STEPS = 12


def at(step=0, share=0.0, epoch=0.0, epochs=1.0, passes=0):
    return Moment(step, share, epoch, epochs, passes)


def rate(settings, moment):
    return settings.shape.rate(settings, moment) * warmup(settings, moment)


def by_torch(make, steps=STEPS, rate=0.5):
    """The rates that a scheduler of torch's sets."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_constant():
    settings = Optimizer(learning_rate=0.5)
    expected = by_torch(lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0))
    assert [rate(settings, at(step)) for step in range(STEPS)] == expected


@pytest.mark.parametrize("schedule", ["constant", "step-decay"])
def test_step_decay(schedule):
    """ENAS: 0.96 per epoch from epoch 15 on; torch's ExponentialLR from the first."""
    settings = Optimizer(learning_rate=20.0, schedule=schedule, decay=0.96, decay_from=15)
    rates = {epoch: rate(settings, at(passes=epoch)) for epoch in (0, 14, 15, 17)}
    assert rates == pytest.approx({0: 20.0, 14: 20.0, 15: 19.2, 17: 20 * 0.96**3})
    settings = Optimizer(learning_rate=0.5, schedule=schedule, decay=0.9, decay_from=1)
    expected = by_torch(lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9))
    assert [rate(settings, at(passes=epoch)) for epoch in range(STEPS)] == pytest.approx(expected)


def test_cosine_with_restarts_by_hand():
    """ENAS' image networks: cycles of 10 + 20 + 40 + 80 + 160 = 310 epochs from .05; half way through one the rate is
    the mean of both ends, at a third it is 3/4 of the way up."""

    def cosine(settings, epoch, epochs):
        return rate(settings, at(epoch=epoch, epochs=epochs))

    settings = Optimizer(
        learning_rate=0.05, schedule="cosine", learning_rate_min=0.0005, restart_epochs=10, restart_factor=2
    )
    top, middle, third = 0.05, 0.02525, 0.0005 + 0.75 * 0.0495
    expected = {0: top, 5: middle, 10: top, 20: middle, 30: top, 50: middle, 70: top, 110: middle, 150: top}
    expected |= {230: middle, 310: top, 9: 0.0005 + 0.0495 * (1 - math.cos(math.pi / 10)) / 2}
    expected |= {309: 0.0005 + 0.0495 * math.sin(math.pi / 320) ** 2}
    assert {epoch: cosine(settings, epoch, 310) for epoch in expected} == pytest.approx(expected, rel=1e-12)
    thirds = Optimizer(learning_rate=0.05, schedule="cosine", learning_rate_min=0.0005, restart_epochs=3)
    assert [cosine(thirds, epoch, 99) for epoch in (1, 5, 13)] == pytest.approx([third] * 3)
    even = Optimizer(learning_rate=0.05, schedule="cosine", restart_epochs=2, restart_factor=1)
    assert [cosine(even, epoch, 99) for epoch in range(4)] == pytest.approx([0.05, 0.025, 0.05, 0.025])
    whole = Optimizer(learning_rate=0.025, schedule="cosine")  # DARTS: one cycle down to nothing
    rates = [cosine(whole, epoch, 50) for epoch in range(50)]
    assert rates[25] == pytest.approx(0.0125) and rates == sorted(rates, reverse=True) and 0 < rates[49] < 3e-5


def test_cosine_against_torch():
    settings = Optimizer(learning_rate=0.5, schedule="cosine", learning_rate_min=0.1)
    expected = by_torch(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=0.1))
    found = [rate(settings, at(epoch=epoch, epochs=STEPS)) for epoch in range(STEPS)]
    assert found == pytest.approx(expected)
    settings = Optimizer(learning_rate=0.5, schedule="cosine", learning_rate_min=0.1, restart_epochs=2)
    expected = by_torch(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, T_mult=2, eta_min=0.1))
    assert [rate(settings, at(epoch=epoch, epochs=99)) for epoch in range(STEPS)] == pytest.approx(expected)


def test_inverse_root_is_the_transformer_papers():
    """rate proportional to min(n^-1/2, n W^-3/2), its peak at the W-th update."""
    settings = Optimizer(learning_rate=0.5, schedule="inverse-root", warmup_steps=4)
    expected = by_torch(
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 2.0 * min((step + 1) ** -0.5, (step + 1) * 4**-1.5))
    )
    found = [rate(settings, at(step)) for step in range(STEPS)]
    assert found == pytest.approx(expected) and max(found) == found[3] == 0.5


@pytest.mark.parametrize("shape", ["linear", "root", "cosine"])
def test_warmup_stable_decay(shape):
    """Four updates up, four at the top, four down to a tenth: torch's SequentialLR for linear and cosine."""
    settings = Optimizer(
        learning_rate=0.5,
        schedule="warmup-stable-decay",
        warmup_steps=4,
        stable_share=8 / 12,
        decay_shape=shape,
        learning_rate_min=0.05,
    )
    found = [rate(settings, at(step, step / STEPS)) for step in range(STEPS + 1)]

    def make(optimizer):
        up = lr_scheduler.LinearLR(optimizer, 0.25, 1.0, total_iters=3)
        flat = lr_scheduler.ConstantLR(optimizer, 1.0)
        if shape == "cosine":
            down = lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=0.05)
        elif shape == "linear":
            down = lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4)
        else:
            down = lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 + 0.9 * (1 - math.sqrt(step / 4)))
        return lr_scheduler.SequentialLR(optimizer, [up, flat, down], [4, 8])

    assert found == pytest.approx(by_torch(make, STEPS + 1))
    assert found[-1] == pytest.approx(0.05)


def test_warmup_as_a_share():
    settings = Optimizer(learning_rate=1.0, warmup_share=0.25)
    assert [rate(settings, at(share=share)) for share in (0.125, 0.25, 0.9)] == [0.5, 1.0, 1.0]
    assert 0 < rate(settings, at(share=0.0)) < 0.01


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_every_schedule_is_positive_and_has_no_state(name):
    given = {"step-decay": {"decay": 0.5}, "inverse-root": {"warmup_steps": 3}}.get(name, {})
    settings = Optimizer(learning_rate=2.0, schedule=name, **given)
    moments = [at(step, step / 20, step / 5, 4.0, step // 5) for step in range(20)]
    rates = [rate(settings, moment) for moment in moments]
    assert all(0 < found <= 2.0 for found in rates)
    assert [rate(settings, moment) for moment in reversed(moments)] == rates[::-1]

import math
import random

import pytest
import torch

from lmnas.methods.proxies.statistics import Undefined, correlation, cosine_score, covariance_score, rank_correlations


def rows_with_correlation(r):
    """Two rows of unit vectors with mean zero and correlation r."""
    a, b = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]).double()
    a, b = a / math.sqrt(2), b / math.sqrt(6)
    return torch.stack([a, r * a + math.sqrt(1 - r * r) * b])


@pytest.mark.parametrize("r", [0.0, 0.5, -0.9])
def test_covariance_score_of_two_rows_is_known(r):
    """Eigenvalues of [[1, r], [r, 1]] are 1 + r and 1 - r."""
    expected = -sum(math.log(v + 1e-5) + 1 / (v + 1e-5) for v in (1 + r, 1 - r))
    assert covariance_score(rows_with_correlation(r)) == pytest.approx(expected, rel=1e-9)


def test_a_row_that_another_determines_costs_as_the_paper_says():
    same = covariance_score(rows_with_correlation(1.0))
    assert same == pytest.approx(-(math.log(2) + 0.5) - (1e5 + math.log(1e-5)), rel=1e-8)
    assert 1e5 + math.log(1e-5) == pytest.approx(99_988.5, abs=0.02)


def test_scale_and_shift_of_a_row_do_not_matter():
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).double()
    moved = rows * torch.tensor([1.0, 2.0, 1e-6, 3e4, 5.0])[:, None] + torch.arange(5)[:, None]
    assert covariance_score(moved) == pytest.approx(covariance_score(rows), rel=1e-6)
    torch.testing.assert_close(correlation(rows), torch.corrcoef(rows))


@pytest.mark.parametrize("score", [covariance_score, cosine_score])
def test_what_is_not_finite_is_undefined(score):
    rows = torch.ones(3, 4).cumsum(1) * torch.tensor([1.0, -2.0, 0.5])[:, None]
    rows[1, 2] = math.nan
    with pytest.raises(Undefined, match="not finite"):
        score(rows)


def test_constant_rows_are_undefined():
    rows = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    rows[2] = 0.1  # its mean is not exactly 0.1
    with pytest.raises(Undefined, match="1 of 4 rows are constant"):
        covariance_score(rows)
    rows[2] = 0.0
    with pytest.raises(Undefined, match="1 of 4 rows are zero"):
        cosine_score(rows)


def test_cosine_score_of_known_rows():
    assert cosine_score(torch.eye(4)) == 1.0
    assert cosine_score(torch.ones(4, 7)) == pytest.approx(0.5)
    two = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert cosine_score(two) == pytest.approx(1 - 0.5 * 0.5 ** (1 / 40))


def test_rank_correlations_of_a_worked_example():
    """Ranks 1 2 3 4 against 1 3 2 4: five of six pairs agree, τ = 4 / 6; ρ = 1 - 6 · 2 / (4 · 15) = 0.8."""
    found = rank_correlations([1, 2, 3, 4], [10, 30, 20, 40], "abcd", seed=0, n_resamples=50)
    assert found["kendall_tau"] == pytest.approx(2 / 3)
    assert found["spearman_rho"] == pytest.approx(0.8)
    assert found["n"] == 4


def test_resampling_keeps_groups_whole():
    """Ten copies of every row add nothing known: the interval is that of the rows once."""
    draws = random.Random(0)
    x = [draws.random() for _ in range(60)]
    y = [a + draws.random() for a in x]
    once = rank_correlations(x, y, range(60), seed=1)
    copied = rank_correlations(x * 10, y * 10, [*range(60)] * 10, seed=1, n_resamples=300)
    alone = rank_correlations(x * 10, y * 10, range(600), seed=1, n_resamples=300)
    width, whole, split = (found["high"] - found["low"] for found in (once, copied, alone))
    assert whole == pytest.approx(width, rel=0.25)
    assert split < 0.5 * width
    assert once["low"] < once["kendall_tau"] < once["high"]
    assert once == rank_correlations(x, y, range(60), seed=1)


@pytest.mark.parametrize("scores", [[1, 2], [1, 1, 1], [1, 2, math.inf]])
def test_correlations_that_do_not_exist_say_so(scores):
    with pytest.raises(Undefined):
        rank_correlations(scores, [3, 1, 2][: len(scores)], range(len(scores)), seed=0)

"""Statistics of training-free metrics: two scores of a matrix's rows, and rank correlation with a bootstrap by group.

Serianni & Kalita, "Training-free Neural Architecture Search for RNNs and Transformers", ACL 2023, arXiv 2306.00288,
checked against the authors' released values. Departures: the eigenvalues come from a symmetric solver in float64 and
are clipped at zero (the release uses a general solver, where a rounding error below zero leaves the score undefined).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lmnas.core.seeds import derive

SOFTENING = 1e-5
"""k of the paper's eq. 1, which keeps a zero eigenvalue finite. One costs 1 / k + ln k = 99,988.5."""
N_RESAMPLES = 1000


class Undefined(Exception):
    """A score does not exist for this network; the message gives the reason in one line."""


def correlation(rows: Tensor) -> Tensor:
    """Pearson correlation of the rows.

    Args:
        rows: (N, M), the N objects compared by M samples.

    Returns:
        (N, N) float64, ones on the diagonal.

    Raises:
        Undefined: a value is not finite, or a row is constant.
    """
    rows = rows.detach().double()
    if not torch.isfinite(rows).all():
        raise Undefined("values that are not finite")
    centred = rows - rows.mean(dim=1, keepdim=True)
    # a constant row leaves rounding errors of its mean, which would count as a signal
    scale = rows.abs().amax(dim=1) * math.sqrt(rows.shape[1])
    norms = centred.norm(dim=1)
    constant = int((norms <= 1e-12 * scale).sum())
    if constant:
        raise Undefined(f"{constant} of {len(rows)} rows are constant")
    normalised = centred / norms[:, None]
    return (normalised @ normalised.t()).fill_diagonal_(1.0)


def covariance_score(rows: Tensor) -> float:
    """Score of uncorrelated rows: S = -Σ_i [ln(λ_i + k) + 1 / (λ_i + k)], λ the eigenvalues of their correlation.

    Args:
        rows: (N, M), the N objects compared by M samples.

    Returns:
        About -N for uncorrelated rows, and lower by 1e5 for every row that the others determine.

    Raises:
        Undefined: a value is not finite, or a row is constant.

    Serianni & Kalita, 2023, eq. 1 (after Mellor et al., 2021, arXiv 2006.04647).
    """
    eigenvalues = torch.linalg.eigvalsh(correlation(rows)).clamp(min=0.0) + SOFTENING
    return -float((eigenvalues.log() + 1.0 / eigenvalues).sum())


def cosine_score(rows: Tensor) -> float:
    """Score of rows that are not parallel: 1 - 1 / (B² - B) · ½ Σ_ij |C_ij|^(1/20), C their cosines, diagonal zero.

    Args:
        rows: (B, M), one row a sample.

    Returns:
        Between 0.5 (all parallel) and 1 (all orthogonal); the sum counts every pair twice and ½ takes one away.

    Raises:
        Undefined: a value is not finite, a row is zero, or there is only one row.

    Serianni & Kalita, 2023. The diagonal must be exactly zero: a rounding error there survives the 20th root.
    """
    rows = rows.detach().double()
    if not torch.isfinite(rows).all():
        raise Undefined("values that are not finite")
    norms = rows.norm(dim=1)
    if len(rows) < 2 or not norms.all():
        raise Undefined(f"{int((norms == 0).sum())} of {len(rows)} rows are zero")
    normalised = rows / norms[:, None]
    cosines = (normalised @ normalised.t()).fill_diagonal_(0.0)
    return 1.0 - 0.5 * float(cosines.abs().pow(1 / 20).sum()) / (len(rows) ** 2 - len(rows))


def rank_correlations(
    scores: Sequence[float],
    targets: Sequence[float],
    groups: Sequence[object],
    seed: int,
    n_resamples: int = N_RESAMPLES,
) -> dict[str, float]:
    """Kendall's τ_b and Spearman's ρ of `scores` with `targets`, and a 95 % bootstrap interval of τ.

    Args:
        scores: one a row.
        targets: what they should predict.
        groups: rows of one group are one architecture: they are drawn into a resample together.
        seed: of the resampling.

    Returns:
        `kendall_tau`, `spearman_rho`, `low` and `high` (percentile interval of τ), `n` (rows).

    Raises:
        Undefined: fewer than three rows, or one side is constant.
    """
    x, y = np.asarray(scores, dtype=float), np.asarray(targets, dtype=float)
    if not len(x) == len(y) == len(groups):
        raise ValueError(f"{len(x)} scores, {len(y)} targets and {len(groups)} groups")
    if len(x) < 3:
        raise Undefined(f"{len(x)} rows; a rank correlation needs at least 3")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise Undefined("values that are not finite")
    if x.min() == x.max() or y.min() == y.max():
        raise Undefined("all values are equal")
    members: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    clusters = [np.asarray(rows) for rows in members.values()]
    draws = np.random.default_rng(derive(seed, "bootstrap"))
    taus = []
    for _ in range(n_resamples):
        drawn = np.concatenate([clusters[i] for i in draws.integers(len(clusters), size=len(clusters))])
        taus.append(stats.kendalltau(x[drawn], y[drawn]).statistic)
    low, high = np.nanpercentile(taus, [2.5, 97.5]) if not np.isnan(taus).all() else (np.nan, np.nan)
    return {
        "kendall_tau": float(stats.kendalltau(x, y).statistic),
        "spearman_rho": float(stats.spearmanr(x, y).statistic),
        "low": float(low),
        "high": float(high),
        "n": len(x),
    }

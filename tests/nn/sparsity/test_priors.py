"""Priors and their updates: worked numbers, formulas against finite differences, promises on random graphs."""

import math
import random

import pytest
import torch

from lmnas.nn.sparsity.priors import (
    HIGHEST,
    LOWEST,
    PRIORS,
    THRESHOLD,
    Switches,
    dependency,
    edge_cap,
    independent,
    omega,
    posterior,
    slope,
    survivors,
    sweep,
)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def singles(*edges):
    return Switches(tuple(edges), tuple(range(len(edges))))


ONE = singles((1, 0))
CHAIN = singles((1, 0), (2, 1), (2, 0))
"""a: 0 -> 1, b: 1 -> 2, c: 0 -> 2."""
R, H = tensor(0.1, 1.0, 0.2), tensor(4.0, 3.0, 2.0)


def random_switches(draws):
    """A random graph with groups: of two to five nodes, one to three operations an edge, some edges missing."""
    n_nodes, n_ops = draws.randint(2, 5), draws.randint(1, 3)
    edges = [(i, j) for i in range(1, n_nodes + 1) for j in range(i) if draws.random() < 0.8] or [(1, 0)]
    entries = [(edge, op) for edge in edges for op in range(n_ops)]
    shared = draws.random() < 0.3
    groups = [edge if shared else (edge, op) for edge, op in entries]
    return Switches(tuple(edge for edge, _ in entries), tuple(groups))


def random_values(draws, n):
    """Switches and curvatures over many sizes, exact zeros among them."""
    w = [draws.choice((0.0, 1.0)) if draws.random() < 0.2 else 10 ** draws.uniform(-4, 1) for _ in range(n)]
    h = [0.0 if draws.random() < 0.1 else 10 ** draws.uniform(-4, 4) for _ in range(n)]
    return tensor(*w), tensor(*h)


def random_cases(n):
    """(draws, switches, prior, w, h, s) over all priors and conventions."""
    for seed in range(n):
        draws = random.Random(seed)
        switches = random_switches(draws)
        make = PRIORS[draws.choice(sorted(PRIORS))]
        prior = make(switches, draws.choice(("normalised", "product")))
        w, h = random_values(draws, len(switches.edges))
        s = tensor(*(10 ** draws.uniform(-3, 3) for _ in range(prior.n_variances)))
        yield draws, switches, prior, w, h, s


# ---------------------------------------------------------------------------------------------------------- formulas


def test_the_slope_does_not_cancel():
    """float32, gamma = 1e-6, h = 2: 2 / 1.000002 = 1.999996; the difference of two precisions gives 2.0625."""
    gamma, h = torch.tensor(1e-6), torch.tensor(2.0)
    assert slope(gamma, h).item() == pytest.approx(1.999996, abs=2e-7)
    cancelling = 1 / gamma - posterior(gamma, h) / gamma**2
    assert cancelling.item() == pytest.approx(2.0625)


def test_slope_and_weights_by_hand():
    """gamma = 1/2, h = 2: C = 1/4, alpha = 1; two such switches in one group give omega = sqrt 2."""
    gamma, h = tensor(0.5, 0.5), tensor(2.0, 2.0)
    assert posterior(gamma, h).tolist() == [0.25, 0.25]
    assert slope(gamma, h).tolist() == [1.0, 1.0]
    assert omega(gamma, h, dim=0).item() == pytest.approx(math.sqrt(2))


def test_the_threshold_is_where_the_priors_entropy_is_zero():
    assert pytest.approx(0.05855, abs=5e-6) == THRESHOLD
    assert torch.distributions.Normal(0, math.sqrt(THRESHOLD)).entropy().item() == pytest.approx(0, abs=1e-7)


# ------------------------------------------------------------------------------------------------------ worked numbers


def test_one_switch_at_fixed_value():
    """w = 1, h = 2: w^2 / 2 + sqrt(w^4 / 4 + w^2 / h) = 1.3660254."""
    prior = independent(ONE)
    gamma = prior.gamma(prior.fit(tensor(1.0), tensor(2.0), prior.initial()))
    assert gamma.item() == pytest.approx(1.3660254, abs=5e-8)
    assert gamma.item() == pytest.approx(0.5 + math.sqrt(0.75), abs=1e-12)


@pytest.mark.parametrize("best, w, gamma", [(1.0, 0.75, 0.75), (0.6, 0.183333, 0.11), (0.4, 0.0, LOWEST)])
def test_one_switch_trained_with_its_penalty(best, w, gamma):
    """E / lambda = h / 2 (w - best)^2 with h = 4: training and updates in turn end where gamma is best^2 - 1 / h."""
    prior, h = independent(ONE), tensor(4.0)
    s, weight = prior.initial(), 1.0  # gamma = omega = 1
    for _ in range(2000):
        value = max(best - weight / 4.0, 0.0)  # minimises h / 2 (w - best)^2 + omega |w|
        s = tensor(min(max(value / weight, LOWEST), HIGHEST))
        weight = prior.penalty(h, s).kappa.sqrt().item()
    assert value == pytest.approx(w, abs=5e-7)
    assert prior.gamma(s).item() == pytest.approx(gamma, abs=5e-7)
    assert (gamma > THRESHOLD) == (0.5 * best**2 * 4 > 0.5)  # a switch survives iff its w^2 H / 2 exceeds lambda / 2


def test_independent_variances_leave_an_edge_dangling():
    prior = independent(CHAIN)
    gamma = prior.gamma(prior.fit(R, H, prior.initial()))
    torch.testing.assert_close(gamma, tensor(0.05525, 1.26376, 0.16283), rtol=0, atol=5e-6)
    assert (gamma > THRESHOLD).tolist() == [False, True, True]
    assert survivors(CHAIN, gamma).tolist() == [False, False, True]


def test_the_dependency_prior_keeps_what_is_needed():
    prior = dependency(CHAIN)
    start = prior.initial()
    first = prior.update(R, H, start)
    assert prior.objective(R, H, start).item() == pytest.approx(5.6743409, abs=5e-8)
    assert prior.objective(R, H, first).item() == pytest.approx(4.7988114, abs=5e-8)
    torch.testing.assert_close(first, tensor(0.9582180, 1.8257419, 0.2449490), rtol=0, atol=5e-8)
    limit = prior.fit(R, H, start, 50)
    torch.testing.assert_close(prior.gamma(limit), tensor(0.7109468, 0.7109468, 0.1628286), rtol=0, atol=5e-8)
    assert survivors(CHAIN, prior.gamma(limit)).all()
    assert prior.fit(R, H, start, 5000)[1] > 1e6  # b's own variance is not what bounds it


def test_the_authors_product_convention():
    prior = dependency(CHAIN, "product")
    gamma = prior.gamma(prior.fit(R, H, prior.initial(), 500))
    torch.testing.assert_close(gamma, tensor(0.6913689, 0.4371859, 0.1628286), rtol=0, atol=5e-8)


def test_the_update_of_the_dependency_prior_in_plain_loops():
    """Fact for fact: kappa_e = (gamma - C) / s^2 + K_dst, s <- sqrt((r^2 + theta^2 R_dst) / kappa), node by node."""
    draws = random.Random(3)
    edges = [(i, j) for i in range(1, 5) for j in range(i) for _ in range(2)]
    switches = singles(*edges)
    prior = dependency(switches)
    r, h = random_values(draws, len(edges))
    s = tensor(*(10 ** draws.uniform(-1, 1) for _ in edges))
    total = {k: sum(s[e].item() for e, (node, _) in enumerate(edges) if node == k) for k in range(1, 5)}
    total[0] = math.inf
    gamma = [1 / (1 / s[e].item() + 1 / total[j]) for e, (_, j) in enumerate(edges)]
    c = [g / (1 + g * x) for g, x in zip(gamma, h.tolist(), strict=True)]
    out = {k: [e for e, (_, j) in enumerate(edges) if j == k] for k in range(5)}
    expected = []
    for e, (node, _) in enumerate(edges):
        k_node = sum((gamma[f] - c[f]) / total[node] ** 2 for f in out[node])
        kappa = (gamma[e] - c[e]) / s[e].item() ** 2 + k_node
        theta = s[e].item() / total[node]
        expected.append(math.sqrt((r[e] ** 2 + theta**2 * sum(r[f] ** 2 for f in out[node])) / kappa))
    torch.testing.assert_close(prior.gamma(s), tensor(*gamma))
    torch.testing.assert_close(prior.update(r, h, s), tensor(*expected).clamp(LOWEST, HIGHEST), rtol=1e-9, atol=0)


# ----------------------------------------------------------------------------------------------------------- promises


def test_three_hundred_random_graphs():
    """The objective never rises, variances stay in their clamp, and no living switch hangs from a dead node."""
    alive = 0
    for draws, switches, prior, w, h, s in random_cases(300):
        objective = prior.objective(w, h, s)
        for _ in range(10):
            s = prior.update(w, h, s)
            lower = prior.objective(w, h, s)
            assert lower <= objective + 1e-11 * objective.abs().clamp_min(1)
            objective = lower
            assert (s >= LOWEST).all() and (s <= HIGHEST).all()
            gamma = prior.gamma(s)
            assert (gamma >= LOWEST).all() and (gamma <= HIGHEST).all()
        kept = survivors(switches, gamma, draws.choice((THRESHOLD, 1.0))).tolist()
        fed = {node for keep, (node, _) in zip(kept, switches.edges, strict=True) if keep}
        given = {source for _, source in switches.edges} - switches.fed
        assert all(source in fed | given for keep, (_, source) in zip(kept, switches.edges, strict=True) if keep)
        alive += sum(kept)
    assert alive > 300


def test_slopes_are_the_derivatives_of_the_log_terms():
    """By autograd through the objective at w = 0, for every prior and convention."""
    for _, _, prior, _, h, s in random_cases(40):
        s = s.requires_grad_()
        zero = torch.zeros_like(h)
        expected = torch.autograd.grad(prior.objective(zero, h, s), s)[0]
        with torch.no_grad():
            torch.testing.assert_close(prior.penalty(h, s).kappa, expected, rtol=1e-8, atol=1e-12)


def test_the_penalty_is_the_majoriser_at_its_minimum():
    """2 sum_i sqrt(kappa_i q_i) is the least over s of sum_i (q_i / s_i + kappa_i s_i), whatever the switches."""
    for _, _, prior, w, h, s in random_cases(20):
        penalty = prior.penalty(h, s)
        other = w + 0.3
        q, kappa = penalty.squares(other), penalty.kappa.clamp_min(1e-300)
        best = (q / kappa).sqrt()
        assert 2 * penalty(other) == pytest.approx((q / best + kappa * best).sum().item(), rel=1e-9)


def test_without_dependency_the_penalty_is_a_weighted_lasso():
    prior, w = independent(CHAIN), R.clone().requires_grad_()
    s = tensor(0.3, 2.0, 0.1)
    cost = prior.penalty(H, s)(w)
    assert cost.item() == pytest.approx((omega(s, H) * R.abs()).sum().item())
    torch.testing.assert_close(torch.autograd.grad(cost, w)[0], omega(s, H))


def test_smooth_and_kink_are_the_penaltys_slopes():
    """By finite differences on either side: the cost grows by smooth * d + kink * (|w + d| - |w|) to first order."""
    for _, _, prior, w, h, s in random_cases(25):
        penalty = prior.penalty(h, s)
        smooth, kink = penalty.slopes(w)
        for e in range(len(w)):
            for d in (1e-9, -1e-9):
                moved = w.clone()
                moved[e] += d
                expected = smooth[e] * d + kink[e] * (moved[e].abs() - w[e].abs())
                assert (penalty(moved) - penalty(w)).item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-13)


def test_proximal_steps_reach_the_minimum_of_a_lasso():
    """h / 2 (w - best)^2 + omega |w|: soft(best, omega / h), the second one exactly zero."""
    prior = independent(ONE)
    for best, expected in ((1.0, 0.75), (0.2, 0.0), (-1.0, -0.75)):
        w = tensor(0.5)
        for _ in range(200):
            w = prior.first_penalty().descend(w, 4.0 * (w - best), rate=0.1, strength=1.0)
        assert w.item() == pytest.approx(expected, abs=1e-12)
        assert (w == 0).item() == (expected == 0)


def test_the_first_penalty_is_a_lasso_whatever_the_prior():
    for make in PRIORS.values():
        assert make(CHAIN, "normalised").first_penalty()(R).item() == pytest.approx(1.3)
    shared = Switches(((1, 0), (1, 0)), ("edge", "edge"))
    assert dependency(shared).first_penalty()(tensor(0.3, 0.4)).item() == pytest.approx(0.5)


def test_shared_groups_share_their_variance():
    """Two operations of one edge in one group: gamma = |w| / omega with the norms of the group."""
    switches = Switches(((1, 0), (1, 0)), ("edge", "edge"))
    prior = independent(switches)
    w, h = tensor(0.3, 0.4), tensor(2.0, 5.0)
    s = prior.update(w, h, prior.initial())
    expected = 0.5 / omega(tensor(1.0, 1.0), h, dim=0)
    torch.testing.assert_close(prior.gamma(s), expected.expand(2))


def test_an_edges_cap_kills_all_of_its_operations():
    switches = Switches(((1, 0), (1, 0), (2, 0)), (0, 1, 2))
    prior = edge_cap(switches)
    s = prior.initial()
    s[3] = 1e-3  # of the edge (1, 0)
    gamma = prior.gamma(s)
    assert (gamma[:2] < THRESHOLD).all() and gamma[2] == 0.5


def test_the_sweep_goes_on_from_node_to_node():
    chain = singles((1, 0), (2, 1), (3, 2), (3, 0))
    assert sweep(chain, [False, True, True, True]) == [False, False, False, True]
    assert sweep(chain, [True, False, True, False]) == [True, False, False, False]

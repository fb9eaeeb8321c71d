"""The segment in torch operations equals the reference, values and all gradients, for one seed and for many."""

import pytest
import torch
from segments import Problem, assert_equal, errors

from lmnas.core.errors import UserError
from lmnas.core.seeds import rng
from lmnas.nn.kernels import Program, fused, reference, segment
from lmnas.spaces.recurrent.cell import RecurrentCell

BATCH_NORMS = ("none", "nodes", "output")
MASKS = ((False, False), (True, False), (False, True), (True, True))


def sampled(n, output, *seed):
    space = RecurrentCell(n_nodes=n, input_activation="searched", output=output)
    return space.program(space.sample(rng(0, "programs", *seed)))


@pytest.fixture
def restored(monkeypatch):
    """The settings of this process as they were, after the test."""
    monkeypatch.setattr(segment, "_products", segment._products)
    monkeypatch.setattr(segment, "_compiled", segment._compiled)


@pytest.mark.parametrize("own", [False, True], ids=["one program", "a program each"])
@pytest.mark.parametrize("output", ["all-nodes", "loose-ends"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_genotypes(dtype, output, own):
    for seed in range(40):
        n, s = (1, 2, 5, 8, 11)[seed % 5], 1 + seed % 3
        programs = [sampled(n, output, seed, k) for k in range(s)]
        problem = Problem(
            s,
            1 + seed % 4,
            (3, 4, 7)[seed % 3] if dtype == torch.float64 else (12, 16, 24)[seed % 3],
            (5, 16, 31)[seed // 2 % 3],
            n,
            seed=seed,
            masks=MASKS[seed % 4],
            programs=programs if own else programs[0],
            dtype=dtype,
        )
        assert_equal(problem, BATCH_NORMS[seed // 4 % 3])


@pytest.mark.parametrize("sharing", ["node", "edge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_mixtures(dtype, sharing):
    for seed in range(24):
        problem = Problem(
            1 + seed % 2,
            1 + seed % 3,
            (3, 4, 7)[seed % 3] if dtype == torch.float64 else (12, 16, 24)[seed % 3],
            (5, 16, 31)[seed // 2 % 3],
            (1, 2, 4, 8)[seed % 4],
            seed=seed,
            masks=MASKS[seed // 2 % 4],
            sharing=sharing,
            dtype=dtype,
        )
        assert_equal(problem, BATCH_NORMS[seed // 4 % 3])


@pytest.mark.parametrize("batch_norm", BATCH_NORMS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", ["path", "paths", "node", "edge"])
def test_every_mask_and_batch_norm(kind, masks, batch_norm):
    program = Program((0, 1, 2, 3, 0), (0, 1, 1, 0), (0, 3, 4))
    other = Program((3, 2, 1, 0, 1), (0, 0, 2, 3), (1, 4))
    programs = {"path": program, "paths": [program, other]}.get(kind)
    assert_equal(Problem(2, 3, 4, 18, 4, seed=1, masks=masks, sharing=kind, programs=programs), batch_norm)


def test_sixteen_seeds():
    assert_equal(Problem(16, 2, 3, 6, 3, seed=3, masks=(True, True)), "nodes")
    programs = [sampled(3, "loose-ends", k) for k in range(16)]
    assert_equal(Problem(16, 2, 3, 6, 3, seed=4, masks=(True, True), programs=programs), "output")


@pytest.mark.parametrize("t, b, batch_norm", [(1, 1, "none"), (1, 4, "nodes"), (6, 1, "none"), (2, 1, "nodes")])
def test_short_and_narrow_segments(t, b, batch_norm):
    """One step, one stream, one node, one column. Batch norm of one stream gives zeros."""
    for h in (1, 17):
        for n, programs in ((1, Program((0, 2), (0,), (1,))), (1, [Program((0, 2), (0,), (1,))]), (1, None), (3, None)):
            assert_equal(Problem(1, t, b, h, n, seed=t + b, programs=programs), batch_norm)


def test_solo_signatures_are_the_references():
    """What dispatch calls: one seed without its axis."""
    program = Program((0, 1, 2, 0), (0, 0, 1), (1, 2, 3))
    for programs, settings in ((program, {}), (program, {"sampled": True}), (None, {})):
        problem = Problem(1, 3, 4, 8, 3, seed=2, masks=(True, True), programs=programs)
        kernel = type("kernel", (), {})
        kernel.recurrent_path = lambda *a, given=settings: segment.recurrent_path(*a, **given)
        kernel.recurrent_mixture = segment.recurrent_mixture
        ours, plain = problem.alone("nodes", kernel), problem.alone("nodes")
        assert max(errors([ours, *problem.gradients(ours)], [plain, *problem.gradients(plain)])) < 1e-10


def test_seeds_do_not_touch_each_other():
    """A seed that is lost to NaN leaves the others' values and gradients as they were."""
    program = Program((0, 1, 2, 0), (0, 0, 1), (1, 2, 3))
    for programs in (program, [program] * 3, None):
        problem = Problem(3, 3, 4, 8, 3, seed=2, masks=(True, True), programs=programs)
        before = problem.run(batch_norm="nodes")
        expected = [before, *problem.gradients(before)]
        with torch.no_grad():
            problem.inputs[1] = torch.nan
        hs = problem.run(batch_norm="nodes")
        assert hs[1].isnan().any()
        for ours, plain in zip([hs, *problem.gradients(hs)], expected, strict=True):
            assert torch.equal(ours[[0, 2]], plain[[0, 2]])


def test_gradients_by_finite_differences():
    for kind in (None, Program((0, 1, 2), (0, 1), (1, 2)), [Program((0, 1, 2), (0, 0), (0, 2))] * 2):
        for batch_norm in BATCH_NORMS:
            problem = Problem(2, 2, 3, 2, 2, seed=5, masks=(True, True), programs=kind)
            # every entry asks for one more backward through the same graph, whose tape the first has used up
            assert torch.autograd.gradcheck(lambda *_, p=problem, bn=batch_norm: p.run(batch_norm=bn), problem.leaves)


def test_retained_graph_gives_the_same_gradients_twice():
    problem = Problem(1, 3, 4, 6, 3, seed=1)
    hs = problem.run(batch_norm="nodes")
    first = torch.autograd.grad(hs, problem.leaves, problem.gradient, retain_graph=True)
    second = torch.autograd.grad(hs, problem.leaves, problem.gradient)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["path", "paths", "mixture"])
def test_only_what_is_asked_for(kind):
    """The architecture step wants no weight gradients; without any, one time step is kept."""
    program = Program((0, 1, 2, 0), (0, 0, 1), (1, 2, 3))
    problem = Problem(2, 3, 4, 6, 3, seed=1, programs={"path": program, "paths": [program] * 2}.get(kind))
    plain = problem.alone("nodes")
    everything = dict(zip(problem.leaves, problem.gradients(plain), strict=True))
    for wanted in problem.leaves:
        for leaf in problem.leaves:
            leaf.requires_grad_(leaf is wanted)
        (gradient,) = torch.autograd.grad(problem.run(batch_norm="nodes"), [wanted], problem.gradient)
        assert max(errors([gradient], [everything[wanted]])) < 1e-10
    for leaf in problem.leaves:
        leaf.requires_grad_()
    with torch.no_grad():
        assert max(errors([problem.run(batch_norm="nodes")], [plain])) < 1e-10


def test_weights_changed_between_the_passes_are_noticed():
    problem = Problem(1, 3, 4, 6, 3, seed=1)
    hs = problem.run()
    with torch.no_grad():
        problem.w_input += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        problem.gradients(hs)


def test_nodes_without_a_part_may_be_infinite():
    """As in the reference, a loose end that overflows does not reach the mean of other nodes."""
    program = Program((3, 3, 0), (0, 0), (2,))
    problem = Problem(1, 1, 2, 4, 2, seed=1, programs=program, dtype=torch.float32)
    with torch.no_grad():
        problem.w_nodes[0].fill_(1e38)
        problem.inputs *= 1e3
        plain = problem.alone()
        assert plain.isfinite().all()
        assert max(errors([problem.run()], [plain])) < 1e-5


def test_wrong_programs_are_refused():
    with pytest.raises(ValueError, match=r"1 programs of \[2\] nodes for 2 seeds"):
        Problem(2, 1, 2, 3, 2, seed=0, programs=[sampled(2, "all-nodes", 0)]).run()
    with pytest.raises(ValueError, match=r"2 programs of \[1, 2\] nodes for 2 seeds"):
        Problem(2, 1, 2, 3, 2, seed=0, programs=[sampled(n, "all-nodes", 0) for n in (1, 2)]).run()
    with pytest.raises(UserError, match=r"products 'fp8' are unknown\. Known: bf16, full"):
        segment.set_products("fp8")


def test_bfloat16_products_of_a_path(restored):
    """Operands rounded, sums and states in float32: gradients within bfloat16's three digits. Mixtures stay exact."""
    program = Program((0, 2, 3, 0), (0, 0, 1), (1, 2, 3))  # no relu: rounding moves values across its kink
    problem = Problem(2, 4, 8, 32, 3, seed=1, masks=(True, True), programs=program, dtype=torch.float32)
    mixture = Problem(2, 3, 8, 16, 3, seed=1, dtype=torch.float32)
    exact, exact_mixture = problem.alone(), mixture.run()
    exact = [exact, *problem.gradients(exact)]
    segment.set_products("bf16")
    hs = problem.run()
    assert hs.dtype == torch.float32
    assert 1e-4 < max(errors([hs, *problem.gradients(hs)], exact)) < 2e-2
    assert torch.equal(mixture.run(), exact_mixture)
    # one step of one node by hand: products of rounded operands, summed in float32
    one = Problem(1, 1, 4, 8, 1, seed=2, programs=Program((0, 2), (0,), (1,)), dtype=torch.float32)
    with torch.no_grad():
        x, h, w, v = (t[0].bfloat16().float() for t in (one.inputs, one.state, one.w_input, one.w_nodes[0]))
        c, a = (x[0] @ w[:8] + h @ w[8:]).chunk(2, -1)
        s = one.state[0] + c.sigmoid() * (a.tanh() - one.state[0])
        c, a = (s.bfloat16().float() @ v).chunk(2, -1)
        expected = s + c.sigmoid() * (a.sigmoid() - s)
        assert max(errors([one.run()[0, 0]], [expected])) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, where its compiler is imported
def test_compiled_between_products(restored, tmp_path, monkeypatch):
    """Fused, the functions between two products are the plain ones; skipped where nothing can be compiled."""
    if fused.compiler() is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    problem = Problem(1, 2, 3, 8, 1, seed=1, dtype=torch.float32)
    plain = problem.alone()
    plain = [plain, *problem.gradients(plain)]
    segment.set_compiled(True)
    hs = problem.run()
    assert max(errors([hs, *problem.gradients(hs)], plain)) < 1e-5
    assert segment._compile.cache_info().currsize >= 4, "forward and backward of node 0 and of node 1"


def test_reference_is_what_we_compare_with():
    """The helper's solo runs are the reference's: one seed by hand."""
    problem = Problem(1, 2, 3, 4, 2, seed=1)
    weights = (problem.inputs[0], problem.state[0], problem.w_input[0], [w[0] for w in problem.w_nodes])
    assert torch.equal(problem.alone()[0], reference.recurrent_mixture(*weights, *(p[0] for p in problem.mixture)))

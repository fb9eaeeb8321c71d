"""What the fused kernel alone promises: blocks and threads, saturated gates, a compiler that is missing."""

import pytest
import torch
from segments import Problem, assert_equal, bit_equal, errors

from lmnas.core.errors import UserError
from lmnas.core.seeds import rng
from lmnas.nn.kernels import Program, decide, fused, use
from lmnas.nn.kernels.fused import Fused
from lmnas.spaces.recurrent.cell import RecurrentCell

FUSED = Fused()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        fused.load()
    except fused.Unavailable as problem:
        pytest.skip(f"no fused kernel: {problem}")


@pytest.fixture
def threads():
    """Sets the number of threads; as it was after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("mixture", [True, False])
def test_sizes_beyond_one_block(threads, mixture):
    """More rows, columns, depth and steps than one piece of a product holds: equal in float64 to the reference, and
    in float32 bit for bit whatever the number of threads, since pieces do not depend on it."""
    space = RecurrentCell(n_nodes=8)
    program = None if mixture else space.program(space.sample(rng(0, "programs")))
    problem = Problem(4, 150, 32, 8, seed=1, masks=(True, True), program=program)
    assert_equal(problem, FUSED, "nodes" if mixture else "none")
    problem = Problem(4, 150, 32, 8, seed=2, masks=(True, True), program=program, dtype=torch.float32)
    found = []
    for count in (1, 2, 3, 4):
        threads(count)
        found.append(problem.solution(FUSED, "nodes"))
    for other in found[1:]:
        assert bit_equal(found[0], other)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 12, 64])
def test_sizes_at_which_other_products_run(batch, threads):
    """One row, few and many, odd widths, columns shared out to threads."""
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.float64):
            for program in (Program((0, 1, 2, 0), (0, 0, 1), (1, 2, 3)), None):
                problem = Problem(2, batch, 157, 3, seed=4, masks=(True, True), program=program, dtype=dtype)
                assert_equal(problem, FUSED, "none" if batch == 1 else "nodes")
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 3])
def test_runs_are_bit_equal(threads):
    """Wide enough for threads to share the work."""
    problem = Problem(3, 64, 200, 3, seed=3, masks=(True, True), dtype=torch.float32)
    torch.set_num_threads(threads)
    try:
        assert bit_equal(problem.solution(FUSED, "nodes"), problem.solution(FUSED, "nodes"))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("op", range(4))
def test_extreme_activations(op):
    """Tiny and saturated pre-activations; where gates are shut for good, gradients underflow, finite."""
    for scale in (1e-6, 1e-3, 30.0, 1e4):
        problem = Problem(1, 3, 40, 1, seed=op, program=Program((op, op), (0,), (0, 1)), dtype=torch.float32)
        with torch.no_grad():
            problem.inputs.mul_(scale), problem.state.mul_(scale)
        if scale < 1e3:
            assert_equal(problem, FUSED)
            continue
        hs, *gradients = problem.solution(FUSED)
        assert max(errors([hs], [problem.run()])) < 1e-5
        assert all(g.isfinite().all() for g in gradients)


def test_sizes_that_do_not_fit_are_refused():
    problem = Problem(2, 3, 6, 2, seed=1)
    problem.state = problem.state[:2]
    with pytest.raises(RuntimeError, match=r"state is \[2, 6\], expected \[3, 6\]"):
        problem.run(FUSED)


def test_without_a_compiler(monkeypatch):
    """`auto` falls back and says why; `fused` is refused."""
    monkeypatch.setattr(fused, "compiler", lambda: None)
    monkeypatch.setattr(fused, "load", fused.load.__wrapped__)
    fused.library_path.cache_clear()
    try:
        assert decide(lambda: 3600.0) == ("reference", "no C++ compiler found (CXX, c++, g++, clang++)")
        with pytest.raises(UserError, match="no C\\+\\+ compiler"):
            use(kernel="fused")
    finally:
        fused.library_path.cache_clear()


def test_auto_compiles_only_if_that_pays(monkeypatch):
    monkeypatch.setattr(fused, "is_cached", lambda: False)
    assert decide(lambda: 10.0)[0] == "reference"
    assert decide(lambda: 1000.0)[0] == "fused"

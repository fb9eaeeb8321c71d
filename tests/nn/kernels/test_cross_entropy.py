"""The fused linear cross-entropy equals the plain one, values and gradients."""

import pytest
import torch

from lmnas.nn.kernels import fused, use, using
from lmnas.nn.kernels.cross_entropy import linear_cross_entropy_reference
from lmnas.nn.kernels.dispatch import linear_cross_entropy


@pytest.fixture(params=[False, True], ids=["reference", "fused"], autouse=True)
def kernel(request):
    """Every test runs with either kernel."""
    if request.param:
        try:
            fused.load()
        except fused.Unavailable as problem:
            pytest.skip(f"no fused kernel: {problem}")
    with using(kernel="fused" if request.param else "reference"):
        yield request.param


def problem(n, width, classes, bias, dtype):
    torch.manual_seed(n + width + classes)
    hidden = torch.randn(n, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, width, dtype=dtype, requires_grad=True)
    b = torch.randn(classes, dtype=dtype, requires_grad=True) if bias else None
    return hidden, weight, b, torch.randint(0, classes, (n,))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n,classes,chunk", [(1, 2, 4), (7, 11, 22), (50, 13, 40), (64, 100, 100)])
def test_equals_plain_with_gradients(n, classes, chunk, bias):
    """Ragged last chunks, one row a chunk, with and without bias, in float64."""
    use(chunk=chunk)
    hidden, weight, b, targets = problem(n, 5, classes, bias, torch.float64)
    leaves = [hidden, weight] + ([b] if bias else [])
    plain = linear_cross_entropy_reference(hidden, weight, b, targets)
    fused = linear_cross_entropy(hidden, weight, b, targets)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(3 * fused, leaves), torch.autograd.grad(3 * plain, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_ignored_targets_count_for_nothing():
    hidden, weight, b, targets = problem(30, 4, 9, True, torch.float64)
    targets[::3] = -100
    plain = linear_cross_entropy_reference(hidden, weight, b, targets)
    fused = linear_cross_entropy(hidden, weight, b, targets)
    torch.testing.assert_close(fused, plain)
    (d_plain,), (d_fused,) = torch.autograd.grad(plain, [hidden]), torch.autograd.grad(fused, [hidden])
    torch.testing.assert_close(d_fused, d_plain)
    assert not d_fused[::3].any()


def test_large_logits_stay_finite():
    """Logits of thousands would overflow an exponential that is not shifted."""
    hidden, weight, _, targets = problem(8, 4, 6, False, torch.float32)
    fused = linear_cross_entropy(1e3 * hidden, weight, None, targets)
    torch.testing.assert_close(fused, linear_cross_entropy_reference(1e3 * hidden, weight, None, targets))


def test_gradients_only_where_asked():
    hidden, weight, b, targets = problem(8, 4, 6, True, torch.float64)
    loss = linear_cross_entropy(hidden.detach(), weight, b.detach(), targets)
    loss.backward()
    assert weight.grad is not None and hidden.grad is None and b.grad is None


@pytest.mark.parametrize("ignored", [False, True])
def test_sizes_beyond_one_block(ignored):
    """More rows, width and classes than one piece of a product holds, in float64; and in float32 the same bits whatever
    the number of threads."""
    use(chunk=500 * 1003)
    hidden, weight, b, targets = problem(701, 32, 1003, True, torch.float64)
    if ignored:
        targets[1::2] = -100
    leaves = [hidden, weight, b]
    plain = linear_cross_entropy_reference(hidden, weight, b, targets)
    ours = linear_cross_entropy(hidden, weight, b, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    for a, theirs in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(a, theirs, rtol=1e-10, atol=1e-14)


def test_threads_change_no_bit(kernel):
    if not kernel:
        pytest.skip("the plain route leaves its products to the library")
    hidden, weight, b, targets = problem(300, 32, 1003, True, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 4):
            torch.set_num_threads(count)
            loss = linear_cross_entropy(hidden, weight, b, targets)
            found.append([loss, *torch.autograd.grad(loss, [hidden, weight, b])])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_unknown_class_is_refused():
    hidden, weight, _, targets = problem(8, 4, 6, False, torch.float64)
    targets[3] = 6
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(hidden, weight, None, targets)


def test_no_kept_target_gives_nan():
    hidden, weight, _, targets = problem(8, 4, 6, False, torch.float64)
    assert linear_cross_entropy(hidden, weight, None, torch.full_like(targets, -100)).isnan()

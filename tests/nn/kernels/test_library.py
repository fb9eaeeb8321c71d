"""What the process asks of the libraries below PyTorch."""

import ctypes

import pytest
import torch

from lmnas.nn.kernels import library


def test_products_are_exact_and_the_route_is_given_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with library.exact_onednn_products():
        assert library.product_error(64, 600, 300, torch.device("cpu")) <= library.EXACT
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_route_that_rounds_is_not_taken(monkeypatch):
    monkeypatch.setattr(library, "product_error", lambda *arguments: 3e-3)
    library._onednn_is_exact.cache_clear()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with library.exact_onednn_products():
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    library._onednn_is_exact.cache_clear()


def test_an_error_is_seen():
    assert 0 < library.product_error(8, 600, 8, torch.device("cpu")) <= library.EXACT
    # the same product in bfloat16 is far beyond
    noise = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 600, generator=noise), torch.randn(600, 8, generator=noise)
    rounded = (a.bfloat16() @ b.bfloat16()).double()
    exact = a.double() @ b.double()
    assert (rounded - exact).norm() / exact.norm() > 100 * library.EXACT


class CLibrary:
    """One that notes what `mallopt` is told."""

    def __init__(self, glibc):
        self.told = {}
        if glibc:
            self.gnu_get_libc_version = None

    def mallopt(self, parameter, value):
        self.told[parameter] = value


@pytest.mark.parametrize("glibc, told", [(True, {-4: 0, -1: 2**31 - 1, -2: 2**26}), (False, {})])
def test_only_glibc_is_told_to_keep_memory(glibc, told, monkeypatch):
    """No block of its own mapping, no trimming below 2 GiB, 64 MiB more at a time."""
    there = CLibrary(glibc)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: there)
    library.keep_freed_memory()
    assert there.told == told


@pytest.mark.parametrize("given", [OSError, TypeError])
def test_without_a_c_library_memory_is_left_alone(given, monkeypatch):
    asked = []

    def refuse(name):
        asked.append(name)
        raise given

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    library.keep_freed_memory()
    assert asked == [None]

"""Use of the libraries below PyTorch by this process: choice of the matrix library, handling of freed memory."""

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

EXACT = 1e-6
"""Relative error up to which a product counts as float32."""
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Freed memory stays with the process, where the C library is glibc; it cannot be taken back.

    A training step allocates the same blocks again and again; large ones would come from the system anew each time, at
    a page fault per 4 kB: a sixth of a retraining step of the DARTS cell.
    """
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return
    if hasattr(library, "gnu_get_libc_version"):  # other libraries' mallopt means something else
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(M_TOP_PAD, 64 << 20)


@contextlib.contextmanager
def onednn_products() -> Iterator[None]:
    """Float32 products by oneDNN; where the processor has units for bfloat16 tiles this rounds, so it must be checked.

    Raises:
        AttributeError, RuntimeError: this PyTorch has no such setting.
    """
    backend: Any = torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def product_error(m: int, k: int, n: int, device: torch.device) -> float:
    """Relative error of an (m, k) by (k, n) product in float32 by the route in use."""
    noise = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=noise).to(device), torch.randn(k, n, generator=noise).to(device)
    exact = a.double() @ b.double()
    return (((a @ b).double() - exact).norm() / exact.norm()).item()


@cache
def _onednn_is_exact() -> bool:
    try:
        with onednn_products():
            return product_error(64, 600, 300, torch.device("cpu")) <= EXACT
    except (AttributeError, RuntimeError):
        return False


@contextlib.contextmanager
def exact_onednn_products() -> Iterator[None]:
    """Float32 products by oneDNN where that is exact, twice as fast as the default on some processors."""
    with onednn_products() if _onednn_is_exact() else contextlib.nullcontext():
        yield

"""The fastest exact float32 matrix product of this machine.

PyTorch sends float32 products to MKL, which on AMD processors runs its AVX2 kernels; oneDNN has AVX-512 kernels that
are two to three times as fast. The one way there is `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`, which asks
for bfloat16 products where the processor has units for whole tiles of them (Intel AMX): there it rounds to three
digits. So nothing is assumed: once per process both routes are measured against float64, and oneDNN's is taken only if
it is exact and faster.

The setting is in force inside `fast_products` alone, around our own kernels; nobody else's products change.
"""

import contextlib
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

Route = str
"""`default` or `onednn`."""

MAX_ERROR = 1e-6
"""Relative; float32 products reach 3e-7 at these sizes, bfloat16 ones 3e-3."""
SHAPES = ((64, 320, 1280), (256, 300, 600), (512, 96, 1024))
"""Rows, inner, columns of the products that are checked and timed."""
LEAST_FLOPS = 2_000_000
"""Below this, oneDNN's look-ups cost more than its kernels save."""


def _settings() -> Any:  # the attribute is missing in old versions and the whole backend in some builds
    backend: Any = torch.backends.mkldnn
    return backend.matmul


allowed = False
"""Whether `fast_products` may take another route at all; `lmnas.kernels.set_kernel` decides."""


@contextlib.contextmanager
def _precision(value: str) -> Iterator[None]:
    settings = _settings()
    before = settings.fp32_precision
    settings.fp32_precision = value
    try:
        yield
    finally:
        settings.fp32_precision = before


def _error(a: Tensor, b: Tensor) -> float:
    exact = a.double() @ b.double()
    return ((a @ b).double() - exact).norm().item() / exact.norm().item()


def _seconds(a: Tensor, b: Tensor, repeats: int = 5) -> float:
    out = a @ b
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return best


@cache
def route() -> Route:
    """Which products `fast_products` runs: measured at the first call, in about 50 ms."""
    try:
        _settings().fp32_precision  # noqa: B018
    except (AttributeError, RuntimeError):
        return "default"
    noise = torch.Generator().manual_seed(0)
    plain = fast = 0.0
    with torch.no_grad():
        for m, k, n in SHAPES:
            a = torch.randn(m, k, generator=noise, dtype=torch.float32)
            b = torch.randn(k, n, generator=noise, dtype=torch.float32)
            plain += _seconds(a, b)
            with _precision("bf16"):
                # gradients need both transposes, which may run other kernels
                if max(_error(a, b), _error(a, b.t().contiguous().t()), _error(a.t().contiguous().t(), b)) > MAX_ERROR:
                    return "default"
                fast += _seconds(a, b)
    return "onednn" if fast < 0.9 * plain else "default"


@contextlib.contextmanager
def fast_products(like: Tensor, flops: float) -> Iterator[None]:
    """Inside, float32 products on the CPU take the fastest exact route.

    Args:
        like: an operand; other devices and types are left alone.
        flops: of a typical product inside.
    """
    fits = like.device.type == "cpu" and like.dtype == torch.float32 and flops >= LEAST_FLOPS
    if allowed and fits and route() == "onednn":
        with _precision("bf16"):
            yield
    else:
        yield

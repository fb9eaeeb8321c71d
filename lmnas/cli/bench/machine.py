"""Readings of the machine: load of other processes, speed of products, memory that a process took."""

import contextlib
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lmnas.nn.kernels.library import EXACT, onednn_products, product_error

BUSY = (0, 1, 2, 5, 6, 7)
"""Columns of a `cpu` line in /proc/stat that are work: user, nice, system, irq, softirq, steal."""
PRODUCTS = ((2048, 600, 300), (1024, 1024, 1024))
"""Rows, inner, columns of the products whose rate is measured."""


def busy_seconds() -> float | None:
    """CPU seconds of all processes of this machine since it started, stolen ones included; None: no /proc."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    except OSError:
        return None
    return sum(int(fields[i]) for i in BUSY if i < len(fields)) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Cores that others kept busy since it was made."""

    def __init__(self) -> None:
        self.busy, self.own, self.wall = busy_seconds(), time.process_time(), time.perf_counter()

    def foreign_cores(self) -> float:
        """The machine's work less this process', per second; 0 where it cannot be known."""
        busy = busy_seconds()
        if busy is None or self.busy is None:
            return 0.0
        wall = time.perf_counter() - self.wall
        return max(0.0, (busy - self.busy) - (time.process_time() - self.own)) / wall


def clock(threads: int, device: torch.device) -> Callable[[], float]:
    """Seconds of this process' CPU with one thread, which others disturb less, else of the wall; a GPU is awaited."""
    if device.type == "cuda":

        def now() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return now
    return time.process_time if threads == 1 else time.perf_counter


def _rate(now: Callable[[], float], m: int, k: int, n: int, seconds: float, device: torch.device) -> float | None:
    """GFLOP/s of an (m, k) by (k, n) product, the best of several; None: it is not exact."""
    if product_error(m, k, n, device) > EXACT:
        return None
    a, b = torch.ones(m, k, device=device), torch.ones(k, n, device=device)
    out = a @ b
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = now()
        for _ in range(5):
            torch.mm(a, b, out=out)
        taken = now() - start
        best = max(best, 5 * 2.0 * m * k * n / taken / 1e9) if taken > 0 else best
    return best


def product_rates(threads: int, device: torch.device, seconds: float = 0.3) -> dict[str, dict[str, float | None]]:
    """GFLOP/s of float32 products, by route (`default`, and on a CPU `onednn`) and size (`2048x600x300`).

    None where a route is missing or not exact.
    """
    now = clock(threads, device)
    found: dict[str, dict[str, float | None]] = {}
    for route in ("default",) if device.type == "cuda" else ("default", "onednn"):
        found[route] = {}
        for m, k, n in PRODUCTS:
            try:
                with onednn_products() if route == "onednn" else contextlib.nullcontext():
                    found[route][f"{m}x{k}x{n}"] = _rate(now, m, k, n, seconds, device)
            except (AttributeError, RuntimeError):  # old versions and some builds have no such setting
                found[route][f"{m}x{k}x{n}"] = None
    return found


def resident_bytes() -> int:
    """Resident memory of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()


def peak_bytes() -> int:
    """The most that was resident since this program started. `ru_maxrss` would count its parent's as well."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"

"""Environment that a result depended on besides its recipe: versions, machine, threads, kernel."""

import contextlib
import platform
from pathlib import Path
from typing import Any

import optuna
import torch

from lmnas.core.version import VERSION
from lmnas.nn.kernels import kernel_in_use
from lmnas.runs.kernel_choice import read_pin


def environment(device: torch.device, threads: int, run: Path | None = None) -> dict[str, Any]:
    """The environment as plain data; the kernel is the one that `run` keeps, where it keeps one."""
    pin = None if run is None else read_pin(run)
    return {
        "lmnas": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "optuna": optuna.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "kernel": kernel_in_use(device.type) if pin is None else pin.kernel,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"

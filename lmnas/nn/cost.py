"""Forecast of the cost of a training before it starts: its model runs once on the `meta` device, where tensors have
shapes and no memory. Bytes held by autograd and operations of products are counted there, for any space and any task.

    step      = weights + gradients + optimiser state + what autograd holds + a chunk of logits + a strategy's copies
    training  = step + averaged and best weights, and room for a checkpoint, which is made between two steps

`lmnas bench memory` puts the forecast beside measured peaks.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lmnas.core.contracts import Batch, Choice, Model, Space, relaxed
from lmnas.nn.kernels import DEFAULT_CHUNK, keeps_a_block, planning

M = TypeVar("M", bound=nn.Module)

LIBRARIES = 64 * 2**20
"""Bytes that libraries of products take at their first use, and the allocator's remains."""
SLACK = 1.15
"""Measured peaks over the sum of what is known: what autograd has in hand at one moment, and holes between blocks."""
PROCESS = 300 * 2**20
"""Resident bytes of a worker process before it has any model: Python, PyTorch, the data."""
THREAD_STACK = 72 * 2**20
"""Address space of one more thread: its stack and its part of the allocator. Counts against `ulimit -v` alone."""
TRAINING_PASSES = 3.0
"""Operations of forward and backward, in forwards."""
PLAIN_FLOPS = 20e9
"""Floating-point operations a second of the plain kernel: low for large models, so that `auto` compiles late."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one training step at its peak, by what holds them."""

    weights: int
    gradients: int
    """Gradients of the weights that take part, and a second copy of the largest one while it is made."""
    optimizer: int
    kept: int
    """Tensors that autograd holds for backward: activations, dropout masks, the loss' own gradients."""
    logits: int
    copies: int
    """Further copies of the weights: of a second-order step, of averaging, of the best so far."""

    def with_chunk(self, chunk: int) -> "StepBytes":
        """The same step with `chunk` logits held at once: the logits and equally many intermediate values."""
        return replace(self, logits=2 * 4 * chunk)

    @property
    def total(self) -> int:
        parts = (self.weights, self.gradients, self.optimizer, self.kept, self.logits, self.copies)
        return int(SLACK * sum(parts)) + LIBRARIES


def on_meta(make: Callable[[], M]) -> M:
    """A model without memory."""
    with torch.device("meta"):
        return make()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def kept_bytes(model: Model, batch: Batch, choice: Choice, kernel: str) -> tuple[int, int]:
    """Bytes that autograd holds between forward and backward of one batch.

    Args:
        model, choice: on `meta`.

    Returns:
        Those of everything but the model's weights, and those of the weights that took part.
    """
    batch = batch.to("meta")
    masks = model.draw_masks(batch, torch.Generator().manual_seed(0))
    held: dict[int, Any] = {}

    def hold(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage  # kept, so that its address is not given to another one
        return tensor

    with planning(kernel), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        loss, _ = model(batch, masks, choice)
    del loss
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    used = sum(storage.nbytes() for address, storage in held.items() if address in own)
    return sum(storage.nbytes() for storage in held.values()) - used, used


def step_forecast(
    model: Model,
    batch: Batch,
    choice: Choice,
    kernel: str,
    *,
    optimizer_copies: int = 0,
    copies: int = 0,
) -> StepBytes:
    """One training step of `model`, which is on `meta`.

    Args:
        batch: the largest one.
        optimizer_copies: of the weights, that the optimiser holds (momentum 1, Adam 2).
        copies: further copies of the weights beside model, gradients and optimiser.
    """
    sizes = [_size(parameter) for parameter in model.parameters()]
    weights, largest = sum(sizes), max(sizes, default=0)
    kept, used = kept_bytes(model, batch, choice, kernel)
    return StepBytes(
        weights=weights,
        # autograd sums the plain kernel's over the time steps before they reach the weights
        gradients=(1 if keeps_a_block(kernel) else 2) * used + largest,
        optimizer=optimizer_copies * weights,
        kept=kept,
        logits=0,
        copies=copies * weights,
    ).with_chunk(DEFAULT_CHUNK)


def training_bytes(forecast: StepBytes, *, averaged: bool, best: bool) -> int:
    """A whole training: `forecast`'s steps beside the averaged and the best weights, and checkpoints between steps.

    A checkpoint copies all that it saves and writes it as one piece, when the tape is free for the plain kernel alone:
    so both are counted.
    """
    further = (averaged + best) * forecast.weights
    saved = forecast.weights + forecast.optimizer + further
    return forecast.total + further + max(0, 2 * saved - forecast.kept)


def example_choice(space: Space, mixture: bool, rng: Any) -> Choice:
    """Choice that a supernet on `meta` runs in a forecast: a mixture if `mixture` is set, else one path."""
    if not mixture:
        return space.sample(rng)
    return {
        table.name: torch.zeros(len(table.edges), len(table.ops), device="meta", requires_grad=True)
        for table in relaxed(space, "a mixture").tables()
    }


def forward_flops(model: Model, batch: Batch, choice: Choice) -> float:
    """Floating-point operations of all products of one batch, forward; backward takes twice as many.

    Args:
        model, choice: on `meta`.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad(), planning("reference"):
        model(batch.to("meta"), {}, choice, penalised=False)
    return float(counter.get_total_flops())


# ------------------------------------------------------------------------------------------------- what there is


def available(device: torch.device, workers: int = 1, threads: int = 1) -> int:
    """Bytes that each worker may still take: of the machine's free memory and its cgroup's its share; of the limit on
    address space (`ulimit -v`), which counts for every process by itself, all that this one has not mapped."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // workers
    free = _cgroup_free()
    found = _meminfo("MemAvailable")
    shared = min(n for n in (found, free) if n is not None) if found is not None or free is not None else 2**62
    shares = shared // workers - (PROCESS if workers > 1 else 0)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return shares
    # a worker maps what this process has, the libraries; threads that are to start need room as well
    return min(shares, limit - _mapped() - threads * THREAD_STACK)


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _mapped() -> int:
    """Address space of this process."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _cgroup_free(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that this process' control group, or one above it, leaves free; None: no limit.

    Version 2 has `memory.max` and `memory.current`, version 1 has `memory/memory.limit_in_bytes` and its usage.
    """
    try:
        entries = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    left = []
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers == "":
            top, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = top / path.lstrip("/")
        # inside a container the group's path may be that of the host: then its own files lie at the top
        for place in (folder, *folder.parents):
            numbers = [_number(place / name) for name in names]
            # files that the kernel can drop count as used in a group, but make way
            if numbers[0] is not None and numbers[1] is not None and numbers[0] < 2**60:
                left.append(numbers[0] - numbers[1] + _droppable(place))
            if place == top:
                break
    return min(left, default=None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # absent, or `max`
        return None


def _droppable(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    pairs = dict(line.split() for line in lines if len(line.split()) == 2)
    return int(pairs.get("total_inactive_file", pairs.get("inactive_file", "0")))

"""The recurrent cell on a GPU: forward and backward of a whole segment, each one recorded CUDA graph that is replayed.

Nine dependent products times 35 time steps are hundreds of kernels of a few microseconds; launched one by one, the GPU
waits for the processor. A graph (https://docs.nvidia.com/cuda/cuda-c-programming-guide, "CUDA Graphs") is launched at
once. The operations are those of `passes`; here is only what recording asks for:

- A graph reads and writes fixed addresses. All that is passed in, kept from forward to backward or handed out lies in
  one block of memory (`Workspace`), laid out anew for every key and shared by all of them, so that memory is bounded by
  the largest segment and not by the number of recordings. What leaves is copied out.
- Because the block is shared, the tape of a forward pass is gone once another one has run. Each pass is given a ticket;
  a backward pass whose ticket is no longer that of the block runs its forward pass again, from the saved arguments.
- A key is recorded when it comes for the second time, and runs operation by operation before: segments of a rare length
  are never recorded. The oldest of `MAX_RECORDINGS` is dropped. Where recording fails, that key stays eager, with one
  warning.

One block for each device and stream: passes on one stream follow each other.

The recording itself is `CudaGraph`; a test hands in another, which runs the function again at every replay.
"""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lmnas.nn.kernels.passes import Arguments, Eager, Plan, Tape, Wants, backward, forward, lay_tape

MAX_RECORDINGS = 128
"""Keys recorded at a time: all the random lengths of a training, its evaluation, and room."""
MAX_SEEN = 4096
"""Keys remembered that came once."""
ALIGNMENT = 512
"""Alignment in bytes, that of the allocator itself."""
LEAST_BLOCK = 1 << 26
"""Bytes of the first block."""
GROWTH = 1.5
"""A block that is too small is replaced, and its recordings with it; random lengths should not do that many times."""

Function = Callable[[], None]
Key = tuple[Plan, torch.Size, torch.dtype, Wants, bool, bool]


class Recording(Protocol):
    """A function that was recorded: `replay` runs it again on the same addresses."""

    def replay(self) -> None: ...


class CudaGraph:
    """A function as a CUDA graph. All share one pool: what a graph allocates is not needed after its replay."""

    def __init__(self, function: Function, pool: Any = None):
        # libraries allocate and choose kernels at their first call, which must not be recorded
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may go on: backward is recorded on autograd's
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            function()

    def replay(self) -> None:
        self.graph.replay()


Recorder = Callable[[Function], Recording]


@dataclass
class Entry:
    """The recordings of one key, and where they read and write."""

    arguments: Arguments
    tape: Tape
    gradient: Tensor | None
    results: tuple[Tensor | None, ...]
    forward: Recording
    backward: Recording | None = None


@dataclass
class Ticket:
    """One forward pass. Valid while it is the workspace's latest."""

    entry: Entry


@dataclass
class Workspace:
    """The block that all recordings of one device and stream share."""

    least: int
    pool: Any = None
    block: Tensor | None = None
    latest: Ticket | None = None
    entries: "OrderedDict[Key, Entry]" = field(default_factory=OrderedDict)
    seen: "OrderedDict[Key, bool]" = field(default_factory=OrderedDict)
    """Keys that came before; False: recording them failed."""

    def reserve(self, size: int, device: torch.device) -> Tensor:
        """The block, of at least `size` bytes."""
        if self.block is None or self.block.numel() < size:
            larger = max(size, self.least if self.block is None else int(GROWTH * self.block.numel()))
            self.entries.clear()
            self.block = self.latest = None  # its memory first
            self.block = torch.empty(larger, dtype=torch.uint8, device=device)
        return self.block


class _Layout:
    """Hands out parts of a block one after the other; without a block it only counts."""

    def __init__(self, like: Tensor, block: Tensor | None = None):
        self.like, self.block, self.offset = like, block, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.like.dtype
        count = 1
        for extent in shape:
            count *= extent
        size = count * dtype.itemsize
        start, self.offset = self.offset, -(-(self.offset + size) // ALIGNMENT) * ALIGNMENT
        if self.block is None:
            return torch.empty(tuple(shape), dtype=dtype, device="meta")
        return self.block[start : start + size].view(dtype).view(tuple(shape))


class Recorded:
    """Runs segments by replaying recordings.

    Args:
        record: makes a recording; default: a CUDA graph.
        after: 1: a key is recorded when it comes again; 0: at once.
        max_recordings: keys recorded at a time.
        least_block: bytes of the first block.
    """

    def __init__(
        self,
        record: Recorder | None = None,
        *,
        after: int = 1,
        max_recordings: int = MAX_RECORDINGS,
        least_block: int = LEAST_BLOCK,
    ):
        self.record = record
        self.after = after
        self.max_recordings = max_recordings
        self.least_block = least_block
        self.workspaces: dict[tuple[torch.device, int], Workspace] = {}
        self.eager = Eager()

    def clear(self) -> None:
        """Give back all memory; what is still to go backward runs its forward pass again."""
        self.workspaces.clear()

    def _workspace(self, x: Arguments) -> Workspace:
        device = x.inputs.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return self.workspaces.setdefault((device, stream), Workspace(self.least_block))

    @staticmethod
    def _key(plan: Plan, x: Arguments, wants: Wants) -> Key:
        return plan, x.inputs.shape, x.inputs.dtype, wants, x.mask_x is not None, x.mask_h is not None

    def _make(self, space: Workspace, function: Function) -> Recording:
        if self.record is not None:
            return self.record(function)
        if space.pool is None:
            space.pool = torch.cuda.graph_pool_handle()
        return CudaGraph(function, space.pool)

    def _entry(self, plan: Plan, x: Arguments, wants: Wants) -> Entry | None:
        """The recordings for these arguments, made if they are due; None: run operation by operation."""
        space = self._workspace(x)
        key = self._key(plan, x, wants)
        if key in space.entries:
            space.entries.move_to_end(key)
            return space.entries[key]
        known = space.seen.get(key)
        if known is False:
            return None
        if known is None and self.after > 0:
            space.seen[key] = True
            while len(space.seen) > MAX_SEEN:
                space.seen.popitem(last=False)
            return None
        try:
            entry = self._recorded(space, plan, x, wants)
        except RuntimeError as problem:
            self._give_up(space, key, problem)
            return None
        space.entries[key] = entry
        while len(space.entries) > self.max_recordings:
            space.entries.popitem(last=False)
        return entry

    def _recorded(self, space: Workspace, plan: Plan, x: Arguments, wants: Wants) -> Entry:
        measured = _Layout(x.inputs)
        self._lay(measured, plan, x, wants)
        layout = _Layout(x.inputs, space.reserve(measured.offset, x.inputs.device))
        arguments, tape, gradient, results = self._lay(layout, plan, x, wants)
        _copy_in(arguments, x)
        recording = self._make(space, partial(forward, plan, arguments, tape))
        return Entry(arguments, tape, gradient, results, recording)

    @staticmethod
    def _lay(
        layout: _Layout, plan: Plan, x: Arguments, wants: Wants
    ) -> tuple[Arguments, Tape, Tensor | None, tuple[Tensor | None, ...]]:
        arguments = Arguments._make(None if v is None else layout.take(v.shape, v.dtype) for v in x)
        tape = lay_tape(plan, x.inputs.shape, any(wants), layout.take)
        gradient = layout.take(x.inputs.shape) if any(wants) else None
        # `Arguments` begins with what gradients can be wanted of
        differentiable = x[: len(wants)]
        results = tuple(
            layout.take(v.shape) if v is not None and wanted else None
            for v, wanted in zip(differentiable, wants, strict=True)
        )
        return arguments, tape, gradient, results

    def forward(self, plan: Plan, x: Arguments, wants: Wants) -> tuple[Tensor, Any]:
        with _on(x.inputs.device):
            entry = self._entry(plan, x, wants)
            if entry is None:
                return self.eager.forward(plan, x, wants)
            ticket = self._replay_forward(entry, x)
            return entry.tape.hs.clone(), ticket

    def _replay_forward(self, entry: Entry, x: Arguments) -> Ticket:
        _copy_in(entry.arguments, x)
        entry.forward.replay()
        ticket = self._workspace(x).latest = Ticket(entry)
        return ticket

    def backward(
        self, plan: Plan, x: Arguments, ticket: Any, gradient: Tensor, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        if isinstance(ticket, Tape):  # its forward pass was eager
            return self.eager.backward(plan, x, ticket, gradient, wants)
        with _on(x.inputs.device):
            return self._backward(plan, x, ticket, gradient, wants)

    def _backward(
        self, plan: Plan, x: Arguments, ticket: Ticket | None, gradient: Tensor, wants: Wants
    ) -> tuple[Tensor | None, ...]:
        space = self._workspace(x)
        if ticket is None or ticket is not space.latest:
            entry = self._entry(plan, x, wants)
            if entry is None:
                return self.eager.backward(plan, x, None, gradient, wants)
            ticket = self._replay_forward(entry, x)
        entry = ticket.entry
        assert entry.gradient is not None
        if entry.backward is None:
            entry.gradient.copy_(gradient)
            try:
                entry.backward = self._make(space, partial(_backward, plan, entry, wants))
            except RuntimeError as problem:
                self._give_up(space, self._key(plan, x, wants), problem)
                return self.eager.backward(plan, x, None, gradient, wants)
            self._replay_forward(entry, x)  # recording used the tape up
        entry.gradient.copy_(gradient)
        entry.backward.replay()
        return tuple(None if result is None else result.clone() for result in entry.results)

    @staticmethod
    def _give_up(space: Workspace, key: Key, problem: Exception) -> None:
        space.entries.pop(key, None)
        space.seen[key] = False
        space.latest = None
        reason = str(problem).strip().splitlines()[0]
        logging.getLogger("lmnas").warning("kernel: a segment runs without a CUDA graph, which is slower: %s", reason)


def _backward(plan: Plan, entry: Entry, wants: Wants) -> None:
    assert entry.gradient is not None
    results = backward(plan, entry.arguments, entry.tape, entry.gradient, wants)
    _copy_in(entry.results, results)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Streams and recordings are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _copy_in(places: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
    for place, value in zip(places, values, strict=True):
        if place is not None and value is not None:
            place.copy_(value)


# ------------------------------------------------------------------------------------------------ running

recorded = Recorded()
"""The recordings of this process."""

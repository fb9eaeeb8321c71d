"""Checkpoints: nested states as safetensors files named by a digest of their content; the last two are kept."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lmnas.core.files import digest, write_atomic


def to_device(value: Any, device: torch.device) -> Any:
    """A nested state with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value


def pack(state: Any) -> bytes:
    """Nested dicts and lists of tensors, numbers, texts and None as one safetensors file (no pickles).

    Tensors become entries `0`, `1`, ...; the structure around them travels as JSON in the header.
    """
    tensors: dict[str, Tensor] = {}

    def skeleton(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = str(len(tensors))
            # a copy: safetensors refuses two entries that share memory
            tensors[key] = value.detach().to("cpu", copy=True).contiguous()
            return {"t": key}
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, (bool, int, float, str, type(None))):
                    raise TypeError(f"a checkpoint cannot hold a dict with a key of type {type(key).__name__}")
            return {"d": [[key, skeleton(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"l" if isinstance(value, list) else "u": [skeleton(item) for item in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")

    document = json.dumps(skeleton(state))
    return save_tensors(tensors, {"state": document})


def unpack(data: bytes) -> Any:
    """The inverse of `pack`; tensors come back on the CPU."""
    # the header is 8 bytes of length, then JSON
    length = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
    tensors = load_tensors(data)

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            ((kind, content),) = value.items()
            if kind == "t":
                return tensors[content]
            if kind == "d":
                return {key: restore(item) for key, item in content}
            items = [restore(item) for item in content]
            return items if kind == "l" else tuple(items)
        return value

    return restore(document)


class Checkpoints:
    """The checkpoints of one job: `000012-<digest>.safetensors`, newest last, the last two kept.

    A name holds the digest of its content, so one rename makes a checkpoint whole and verifiable. An extra one written
    when the user interrupts is marked: recovery from NaN must not depend on when somebody pressed Ctrl-C.
    """

    PATTERN = re.compile(r"(\d{6})(-extra)?-([0-9a-f]{16})\.safetensors")

    def __init__(self, directory: Path, warn: Callable[[str], None]):
        self.directory = directory
        self.warn = warn

    def _found(self) -> list[tuple[int, bool, str, Path]]:
        """(index, extra, digest, path), oldest first."""
        if not self.directory.is_dir():
            return []
        matches = [(self.PATTERN.fullmatch(path.name), path) for path in self.directory.iterdir()]
        return sorted((int(m[1]), bool(m[2]), m[3], path) for m, path in matches if m)

    def save(self, state: Any, *, extra: bool = False) -> None:
        """Write `state`; `extra` marks one that was not due. `state["index"]` orders them."""
        self.directory.mkdir(parents=True, exist_ok=True)
        data = pack(state)
        name = f"{state['index']:06d}{'-extra' if extra else ''}-{digest(data)}.safetensors"
        write_atomic(self.directory / name, data)
        found = self._found()
        # one of this number or a later one is broken: work goes on from before it
        before = [path for index, is_extra, _, path in found if not is_extra and index < state["index"] + extra]
        keep = {*before[-1 - extra :], self.directory / name}
        for _, _, _, path in found:
            if path not in keep:
                path.unlink(missing_ok=True)
        self._sweep()

    def load(self, *, due_only: bool = False) -> Any | None:
        """The newest good state, or None. A broken one is named and passed over."""
        broken = 0
        for _, extra, expected, path in reversed(self._found()):
            if extra and due_only:
                continue
            try:
                data = path.read_bytes()
                if digest(data) != expected:
                    raise ValueError("its content does not match its digest")
                return unpack(data)
            except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
                self.warn(f"checkpoint {path} is broken ({error}); it is passed over")
                broken += 1
        if broken:
            self.warn("no good checkpoint is left; starting over")
        return None

    def delete(self) -> None:
        for _, _, _, path in self._found():
            path.unlink(missing_ok=True)
        self._sweep()
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def _sweep(self) -> None:
        """Remove what a kill left of a checkpoint half written."""
        for path in self.directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)

"""The fast CPU path of the recurrent cell and of the softmax layer: C++ behind the signatures of the plain ones.

The extension is compiled once and kept in the user's cache directory, by source, compiler, PyTorch and processor.
It is compiled here and not by `torch.utils.cpp_extension`, which needs ninja and Python's headers; it needs neither.

Exact: equal to the reference but for the order of sums. What it does not take (other devices and types, autocast, a
gradient of a mask, a gradient of a gradient) is the reference's, see `Segment.takes`.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lmnas.core.errors import UserError
from lmnas.nn.kernels.cross_entropy import chunk_rows, scaled
from lmnas.nn.kernels.library import keep_freed_memory
from lmnas.nn.kernels.reference import Operands, Program
from lmnas.nn.kernels.segment import Segment, one_floating_type

SOURCES = sorted((Path(__file__).parent / "csrc").glob("*.cpp"))
HEADERS = sorted((Path(__file__).parent / "csrc").glob("*.h"))
COMPILE_SECONDS = 30.0
"""Approximate time in seconds of compiling on one core."""
_BATCH_NORM = {"none": 0, "nodes": 1, "output": 2}


class Unavailable(Exception):
    """The extension is unavailable: no compiler, or it failed. The message gives the cause in one line."""


# ------------------------------------------------------------------------------------------------ building


def compiler() -> str | None:
    """The C++ compiler: the environment's CXX, else c++, g++ or clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def _flags() -> list[str]:
    # no -ffast-math; the two -fno options change no value, they let loops with choices be vectorised
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-w"]
    if platform.machine() in ("x86_64", "AMD64"):
        return [*flags, "-march=native", "-mprefer-vector-width=512"]
    return [*flags, "-mcpu=native"]


def _processor() -> str:
    """Identity of the processor, on which -march=native depends: machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@cache
def library_path() -> Path:
    """Path of the compiled extension, which may not exist yet.

    Raises:
        Unavailable: no compiler.
    """
    name = compiler()
    if name is None:
        raise Unavailable("no C++ compiler found (CXX, c++, g++, clang++)")
    version = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    key = [*texts, version, torch.__version__, _processor(), *_flags()]
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "lmnas" / "kernels" / f"recurrent-{digest}.so"


def is_cached() -> bool:
    """True if `load` would find the extension compiled."""
    try:
        return library_path().exists()
    except Unavailable:
        return False


def _compile(path: Path) -> None:
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    # PyTorch's own OpenMP library comes first: two of them in one process would fight for the cores
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            command = [str(compiler()), *_flags(), abi, *include, *map(str, SOURCES), "-o", str(built), *link]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise Unavailable(f"{compiler()} failed: {errors[0] if errors else 'no message'}")
            os.replace(built, path)  # whoever compiles at the same time never sees half a file
    except OSError as error:
        raise Unavailable(f"cannot write {path.parent} ({error.strerror})") from error


@cache
def load() -> None:
    """Compile the extension unless it is cached, and load it.

    Raises:
        Unavailable: no compiler, or it failed.
    """
    path = library_path()
    if not path.exists():
        _compile(path)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise Unavailable(f"cannot load {path} ({error})") from error
    keep_freed_memory()


# ------------------------------------------------------------------------------------------------ running


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(context, settings: tuple, mask_x, mask_h, *tensors: Tensor) -> Tensor:
        inputs, state, w_input, p_input, p_edges, output_weights, *w_nodes = tensors
        needs = context.needs_input_grad[3:]
        ops, sources, batch_norm = settings
        weights = (w_input, w_nodes, p_input, p_edges, output_weights)
        arguments = (inputs, state, *weights, ops, sources, mask_x, mask_h, _BATCH_NORM[batch_norm])
        result = torch.ops.lmnas.segment_forward(*arguments, any(needs))
        hs = result[0]
        if any(needs):
            context.arguments = arguments
            context.needs = [int(need) for need in (*needs[:6], any(needs[6:]))]
            context.tape = result[1]
            context.save_for_backward(hs, *tensors)  # also notices weights that were changed in place
        return hs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient: Tensor):
        hs = context.saved_tensors[0]
        arguments, tape, context.tape = context.arguments, context.tape, None
        if tape is None:  # a graph that was retained: the first backward used the tape up
            tape = torch.ops.lmnas.segment_forward(*arguments, True)[1]
        gradients = torch.ops.lmnas.segment_backward(*arguments, gradient, hs, tape, context.needs)
        gradients += [None] * (len(context.needs_input_grad) - 3 - len(gradients))
        return (None, None, None, *gradients)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int) -> Tensor:
        chunk, wants = chunk_rows(len(weight)), context.needs_input_grad[:3]
        loss, *gradients = torch.ops.lmnas.linear_cross_entropy(hidden, weight, bias, targets, ignore, chunk, *wants)
        context.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient: Tensor):
        return scaled(context, gradient)


class Fused(Segment):
    """The extension on a CPU; on a GPU the recorded segments of the base class. Differentiable once."""

    runs_on: ClassVar = {"cpu": "fused", "cuda": "graphs"}

    def unavailable(self) -> str | None:
        try:
            library_path()
        except Unavailable as problem:
            return str(problem)
        return None

    def must_compile(self) -> bool:
        return self.unavailable() is None and not is_cached()

    def prepare(self) -> None:
        try:
            load()
        except Unavailable as problem:
            raise UserError(f"kernel 'fused': {problem}; 'auto' falls back to the reference") from problem

    def recurrent_path(self, x: Operands, program: Program, sampled: bool = False) -> Tensor:
        if x.inputs.device.type != "cpu":
            return super().recurrent_path(x, program, sampled)
        shares = x.inputs.new_zeros(len(program.ops))
        for node in program.outputs:
            shares[node] += 1.0 / len(program.outputs)
        unused = x.inputs.new_empty(0)
        return self._run(x, (list(program.ops), list(program.inputs)), unused, unused, shares)

    def recurrent_mixture(self, x: Operands, p_input: Tensor, p_edges: Tensor, output_weights: Tensor) -> Tensor:
        if x.inputs.device.type != "cpu":
            return super().recurrent_mixture(x, p_input, p_edges, output_weights)
        return self._run(x, ([], []), p_input, p_edges, output_weights)

    @staticmethod
    def _run(x: Operands, program: tuple[list[int], list[int]], *mixture: Tensor) -> Tensor:
        load()
        tensors = (x.inputs, x.state, x.w_input, *mixture, *x.w_nodes)
        if not torch.is_grad_enabled():  # autograd would tell `forward` that gradients are needed all the same
            tensors = tuple(tensor.detach() for tensor in tensors)
        return _Segment.apply((*program, x.batch_norm), x.mask_x, x.mask_h, *tensors)

    def takes_softmax(self, hidden: Tensor, *others: Tensor) -> bool:
        return hidden.device.type == "cpu" and one_floating_type(hidden, *others)

    def linear_cross_entropy(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore: int = -100
    ) -> Tensor:
        load()
        if not torch.is_grad_enabled():
            hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets, ignore)

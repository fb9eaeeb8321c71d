"""Options that several benches share, and what they mean."""

import argparse
import math
import os
from collections.abc import Iterable

import torch

from lmnas.cli.bench.contract import Say
from lmnas.core.errors import UserError, nearest
from lmnas.nn.kernel_table import CHOICES
from lmnas.nn.kernels import decide, must_compile, use
from lmnas.runs.build import open_device


def add_common(parser: argparse.ArgumentParser) -> None:
    """--rows, --threads, --kernel, --per-edge, --small."""
    parser.add_argument("--rows", help="only these, separated by commas")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores up to four)")
    parser.add_argument("--kernel", default="auto", help=f"what runs our side: {', '.join(CHOICES)} (default: auto)")
    parser.add_argument("--per-edge", action="store_true", help="the plain side takes one product for every edge")
    # toy sizes, for tests of the bench itself
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)


def chosen_rows(given: str | None, known: Iterable[str], option: str = "--rows", what: str = "row") -> list[str]:
    """The rows (or what else `option` names) to measure, in the order given.

    Raises:
        UserError: unknown or none.
    """
    known = list(known)
    rows = known if given is None else [name.strip() for name in given.split(",") if name.strip()]
    if not rows:
        raise UserError(f"{option}: expected names separated by commas, got {given!r}. Known: {', '.join(known)}.")
    for name in rows:
        if name not in known:
            raise UserError(f"{option}: {what} {name!r} is unknown. {nearest(name, known)}")
    return list(dict.fromkeys(rows))


def positive(option: str, value: int) -> int:
    if value < 1:
        raise UserError(f"{option}: expected at least 1, got {value}")
    return value


def settle_threads(given: int | None) -> int:
    """Sets PyTorch's threads, and returns how many."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(4, cores) if given is None else positive("--threads", given)
    torch.set_num_threads(threads)
    return threads


def settle_kernel(name: str, say: Say) -> str:
    """Take the kernel for this process, and say so if it is compiled first; returns its name.

    Raises:
        UserError: unknown, or it cannot be had.
    """
    if name not in CHOICES:
        raise UserError(f"--kernel: kernel {name!r} is unknown. {nearest(name, CHOICES)}")
    kernel = decide(lambda: math.inf)[0] if name == "auto" else name
    if must_compile(kernel):
        say(f"compiling the {kernel} kernel, about 15 s, once")
    use(kernel=kernel)
    return kernel


def settle_device(name: str) -> torch.device:
    try:
        return open_device(name)
    except UserError as error:
        raise UserError(str(error).replace("execution.device", "--device")) from None

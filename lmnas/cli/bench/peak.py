"""One side of one row in a process of its own, for its peak of memory: `python -m lmnas.cli.bench.peak ...`."""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

from lmnas.cli.bench.machine import peak_bytes, resident_bytes
from lmnas.cli.bench.rows import ROWS, Sizes
from lmnas.core.errors import UserError
from lmnas.nn.kernels import use

SIDES = ("ours", "plain")
TIMES = 2
"""The second step still holds the gradients of the first."""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--per-edge", action="store_true")
    parser.add_argument("--small", action="store_true")
    return parser


def main() -> None:
    options = arguments().parse_args()
    torch.set_num_threads(options.threads)
    use(kernel=options.kernel)
    before = resident_bytes()
    row = ROWS[options.row](Sizes.small() if options.small else Sizes(), torch.device("cpu"), options.per_edge)
    work = row.ours if options.side == "ours" else row.plain
    for _ in range(TIMES):
        work()
    print(json.dumps({"bytes": peak_bytes() - before}))


def measure(row: str, side: str, threads: int, kernel: str, per_edge: bool, small: bool) -> int:
    """Bytes by which a fresh process grew at its peak while it did `row` by one side.

    Raises:
        UserError: it died, for want of memory as a rule.
    """
    command: list[Any] = [sys.executable, "-m", "lmnas.cli.bench.peak", "--row", row, "--side", side]
    command += ["--threads", str(threads), "--kernel", kernel]
    command += ["--per-edge"] * per_edge + ["--small"] * small
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"row {row}, {side}: its process for measuring memory died ({last})")
    return int(json.loads(done.stdout)["bytes"])


if __name__ == "__main__":
    main()

"""Measurements of `lmnas bench NAME`. A new one is one file and one line in `BENCHES`.

The contract of a bench's module is `lmnas.cli.bench.contract.Bench`.
"""

import importlib
from typing import cast

from lmnas.cli.bench.contract import Bench
from lmnas.core.errors import UserError, nearest

BENCHES: dict[str, str] = {
    "cell": "lmnas.cli.bench.cell",
    "conv": "lmnas.cli.bench.conv",
    "memory": "lmnas.cli.bench.memory",
    "overhead": "lmnas.cli.bench.overhead",
    "curvature": "lmnas.cli.bench.curvature",
    "nas-bench-nlp": "lmnas.cli.bench.nas_bench_nlp",
    "nas-bench-bert": "lmnas.cli.bench.nas_bench_bert",
}
"""Name -> module, imported when it is asked for."""


def open_bench(name: str) -> Bench:
    """The bench's module.

    Raises:
        UserError: unknown; offers the nearest name.
    """
    if name not in BENCHES:
        raise UserError(f"bench {name!r} is unknown. " + nearest(name, BENCHES))
    return cast(Bench, importlib.import_module(BENCHES[name]))

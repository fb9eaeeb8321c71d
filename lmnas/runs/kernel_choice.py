"""The kernel that a run keeps: `kernel.json` in its directory, `{"kernel": "fused", "why": "...", "chunk": 2000000}`.

Kernels are equal but for the order of their sums, so a run that is killed and continued must not change from one to the
other: its first start decides, every job follows.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from lmnas.core.errors import UserError
from lmnas.core.files import write_json
from lmnas.nn.kernel_table import KERNELS
from lmnas.nn.kernels import DEFAULT_CHUNK, use

FILE = "kernel.json"


@dataclass(frozen=True)
class Pin:
    """Kernel of the recurrent cell, and number of logits that the loss holds at once."""

    kernel: str
    why: str
    chunk: int

    def apply(self) -> None:
        """Take it in this process.

        Raises:
            UserError: the kernel is unavailable.
        """
        use(kernel=self.kernel, chunk=self.chunk)


def read_pin(run: Path) -> Pin | None:
    """The pin of a run; None: it has none yet. A run from before there were pins keeps what its recipe says.

    Raises:
        UserError: the file is broken.
    """
    path = run / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return _before_pins(run)
    except (OSError, ValueError) as error:
        raise UserError(_broken(path, str(error))) from None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        kernel, chunk = document["kernel"], int(document["chunk"])
        if kernel in KERNELS and chunk > 0:
            return Pin(kernel, str(document.get("why", "")), chunk)
    raise UserError(_broken(path, f"expected kernel ({', '.join(KERNELS)}) and chunk (a positive number)"))


def _before_pins(run: Path) -> Pin | None:
    if not any((run / "jobs").glob("*")):
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        kernel = (recipe.get("execution") or {}).get("kernel", "reference")
        if kernel in KERNELS:
            return Pin(kernel, "as the run began", DEFAULT_CHUNK)
    return None


def _broken(path: Path, cause: str) -> str:
    return f"{path}: cannot be read ({cause}); delete it to choose the kernel anew, which may change last digits"


def write_pin(run: Path, pin: Pin) -> None:
    write_json(run / FILE, asdict(pin))

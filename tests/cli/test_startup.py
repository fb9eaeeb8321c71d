"""What answers at once does not import torch."""

import subprocess
import sys

import pytest

CODE = """
import sys
from lmnas.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(sorted({"torch", "optuna", "numpy"} & sys.modules.keys()), code, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--help"], 0),
        (["list"], 0),
        (["list", "strategies", "--json"], 0),
        (["search", "quickstrat"], 2),
        (["search", "quickstart", "--strategy", "randam"], 2),
        (["search", "quickstart", "--train.seeds", "many"], 2),
        (["search", "quickstart", "--sead", "3"], 2),
    ],
)
def test_no_torch_is_imported(arguments, code):
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == f"[] {code}"

"""What answers at once does not import torch."""

import subprocess
import sys

import pytest

from lmnas.core import registry
from lmnas.core.settings import settings_model
from lmnas.runs.recipe import SECTIONS

CODE = """
import sys
from lmnas.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
print(sorted({"torch", "optuna", "numpy"} & sys.modules.keys()), code, file=sys.stderr)
"""


@pytest.mark.parametrize("kind", [*SECTIONS, "metric"])
def test_settings_are_read_from_the_source(kind):
    """As importing the component says them, in the same order."""
    for name in registry.names(kind):
        assert registry.setting_names(kind, name) == list(settings_model(registry.component(kind, name)).model_fields)


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
        (["search", "quickstart", "--strategy.learnig_rate", "3"], 2),
        (["search", "quickstart", "--task.dta", "x"], 2),
        (["search", "quickstart", "--space.nods", "4"], 2),
        (["search", "quickstart", "--strategy", "random", "--strategy.rate", "3"], 2),
        (["search", "quickstart", "--strategy", "bayes", "--strategy.rate", "3"], 2),
    ],
)
def test_no_torch_is_imported(arguments, code):
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == f"[] {code}"

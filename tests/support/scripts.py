"""Scripts as modules: those of `benchmarks/` by name, others by path."""

import importlib.util
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def script(name):
    return load(SCRIPTS / f"{name}.py")

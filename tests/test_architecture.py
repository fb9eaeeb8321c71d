"""Imports point down the table of parts, and some things are not done at all. A failure names the line."""

import ast
from pathlib import Path

import pytest

from lmnas import registry

PACKAGE = Path(registry.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

VALUES = {"errors", "seeds", "genotype", "decisions", "protocols", "evidence"}
"""Plain values and contracts: whoever needs them may import them."""
ALLOWED = {
    "errors": set(),
    "seeds": set(),
    "files": {"errors"},
    "decisions": {"errors"},
    "genotype": {"errors"},
    "job": {"errors", "files"},
    "published": {"errors"},
    "protocols": {"decisions", "genotype", "job"},
    "evidence": set(),
    "registry": {"errors"},
    "kernels": {"errors"},
    "ops": {"kernels"},
    "curvature": VALUES | {"kernels", "ops"},
    "spaces": VALUES | {"kernels", "ops", "published"},
    "tasks": VALUES | {"kernels", "ops", "files"},
    "strategies": VALUES,
    "train": VALUES | {"files", "job", "registry"},
    "proxies": VALUES | {"kernels", "ops"},
    "estimators": VALUES | {"curvature", "files", "job", "proxies", "published", "train"},
    "verdict": VALUES,
    "report": VALUES | {"files", "verdict"},
    "progress": set(),
    "forecast": VALUES | {"kernels"},
    "pin": {"errors", "files", "kernels"},
    "config": {"errors", "registry", "train"},
    "sparsity": VALUES | {"curvature", "files", "job", "train"},
    "jobs": VALUES | {"config", "files", "job", "kernels", "pin", "registry", "sparsity", "train"},
    "executors": {"errors", "jobs"},
    "score": VALUES | {"jobs", "kernels", "proxies", "registry", "tasks"},
    "bench": VALUES
    | {"estimators", "forecast", "job", "jobs", "kernels", "registry", "report", "spaces", "strategies", "tasks"}
    | {"curvature", "files", "ops", "proxies", "published", "score", "train"},
}
"""Part -> the other parts that it may import. Parts that are not here (the driver, the command line) stand on top."""
ON_TOP = {"__init__", "api", "cli", "compress", "experiment", "plan", "preflight", "run", "show"}
BANNED = {"torchvision", "torchaudio", "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
BANNED_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
}


def part(path):
    """`spaces` for a file of that folder, the file's own name at the top."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(source):
    """(line, dotted module) of every import, those inside functions as well; `from lmnas import x` is lmnas.x."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}" if node.module == "lmnas" else str(node.module)


def upward(own, source):
    """(line, part) of the imports that `own` may not have."""
    for line, module in imports(source):
        top, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if top == "lmnas" and other and other != own and own in ALLOWED and other not in ALLOWED[own]:
            yield line, other


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {part(path)} must not import {other}"
        for path in FILES
        for line, other in upward(part(path), path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_part_has_its_place():
    assert {part(path) for path in FILES} == set(ALLOWED) | ON_TOP


def test_the_table_has_no_circle():
    """Walking down from any part never comes back to it."""

    def below(name, seen):
        for other in ALLOWED[name]:
            assert other not in seen, f"{' -> '.join((*seen, other))}"
            below(other, (*seen, other))

    for name in ALLOWED:
        below(name, (name,))


@pytest.mark.parametrize(
    "own, source",
    [
        ("kernels", "from lmnas.spaces.lstm import LSTM"),
        ("ops", "import lmnas.spaces.lstm"),
        ("strategies", "def f():\n    from lmnas.tasks import corpora"),
        ("strategies", "from lmnas import spaces"),
        ("strategies", "from lmnas.estimators.shared import Shared"),
        ("estimators", "from lmnas.strategies.gradient import Gradient"),
        ("spaces", "from lmnas.tasks.language_modeling import LanguageModeling"),
        ("report", "from lmnas.experiment import Experiment"),
        ("report", "from lmnas import train"),
    ],
)
def test_the_check_can_fail(own, source):
    assert list(upward(own, source))


def test_nothing_imports_what_was_decided_against():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {module}"
        for path in FILES
        for line, module in imports(path.read_text())
        if module.split(".")[0] in BANNED
    ]
    assert not wrong, "\n".join(wrong)


def forbidden_calls(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            keywords = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
            name = ast.unparse(node.func)
            if name in BANNED_CALLS or keywords & {"shell", "allow_pickle"}:
                yield node.lineno, name


def test_nothing_runs_code_that_a_file_brings():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}(...)"
        for path in FILES
        for line, name in forbidden_calls(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)
    assert list(forbidden_calls("torch.load(path)\nnp.load(path, allow_pickle=True)\neval(text)")) == [
        (1, "torch.load"),
        (2, "np.load"),
        (3, "eval"),
    ]


def test_components_do_not_name_those_of_other_kinds():
    """Lists of names in other files go stale; what must be known of a component is said by an attribute."""
    folders = {"space": "spaces", "strategy": "strategies", "estimator": "estimators", "task": "tasks"}
    wrong = []
    for kind, folder in folders.items():
        foreign = {name for other in folders if other != kind for name in registry.names(other)}
        for path in (PACKAGE / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and node.value in foreign:
                    wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: names {node.value!r}")
    assert not wrong, "\n".join(wrong)

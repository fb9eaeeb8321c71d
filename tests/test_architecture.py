"""Imports point down the table of parts, and some things are not done at all. A failure names the line."""

import ast
from pathlib import Path

import pytest
from scripts import script

from lmnas.core import registry

PACKAGE = Path(registry.__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))

ROOMS = ("core", "nn", "spaces", "tasks", "methods", "report", "runs", "cli")
"""The rooms, from the ground up: each may import those before it."""
FACE = {"__init__", "__main__", "py"}
"""What lies beside the rooms: the public face, imported by nobody."""
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


def room(path):
    """The room of a file; the file's own name at the top."""
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
    """(line, module) of the imports that `own` may not have."""
    allowed = set(ROOMS) if own in FACE else set(ROOMS[: ROOMS.index(own) + 1])
    for line, module in imports(source):
        top, _, rest = module.partition(".")
        if top == "lmnas" and rest.partition(".")[0] not in allowed:
            yield line, module


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {room(path)} must not import {module}"
        for path in FILES
        for line, module in upward(room(path), path.read_text())
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_is_in_a_room():
    assert {room(path) for path in FILES} <= set(ROOMS) | FACE
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == {
        *ROOMS,
        "__init__.py",
        "__main__.py",
        "py.typed",
    }


@pytest.mark.parametrize(
    "own, source",
    [
        ("nn", "from lmnas.spaces.recurrent.layers import LSTM"),
        ("core", "import lmnas.nn.train"),
        ("core", "import lmnas"),
        ("spaces", "def f():\n    from lmnas.tasks.data import corpora"),
        ("spaces", "from lmnas import methods"),
        ("tasks", "from lmnas.methods.strategies.gradient import Gradient"),
        ("report", "from lmnas.runs.experiment import Experiment"),
        ("runs", "from lmnas.cli import main"),
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


# --------------------------------------------------------------------------------------------------------------- leaks

HOUSE = script("house")
CHECKOUT = HOUSE.Checkout(PACKAGE.parent)
MEASURED = {
    "conv": {"DartsConv", "EnasMicro", "enas-micro"},
    "curvature": {"RecurrentCell", "LanguageModeling"},
    "memory": {"random"},
    "nas_bench_bert": {"FlexiBERT"},
    "nas_bench_nlp": {"RecurrentGraph", "random"},
    "overhead": {"Shared", "RecurrentCell", "random", "gradient", "language-modeling"},
    "rows": {"RecurrentCell", "lstm"},
}
BASELINES = ("report/verdict", "runs/compress", "runs/forecast", "runs/select", "runs/start")
SAID = {
    # a bench measures the components that it names
    **{f"lmnas/cli/bench/{name}.py": frozenset(words) for name, words in MEASURED.items()},
    # a subclass: the same cell with several inputs a node
    "lmnas/spaces/recurrent/sparse.py": frozenset({"RecurrentCell"}),
    # `random` is a baseline: the best of random candidates, whatever the strategy
    **{f"lmnas/{name}.py": frozenset({"random"}) for name in BASELINES},
}
"""Words of a file that happen to be a component's name, or that it must name; each with its reason."""
OWN_KINDS = {
    "lmnas/core/checkpoints.py",  # how a checkpoint marks a tensor, a dict, a list
    "lmnas/core/registry.py",  # kinds of components
    "lmnas/report/diagram.py",  # nodes and labels of a drawing
    "lmnas/spaces/conv/network.py",  # cells that keep and reduce the map
    "lmnas/spaces/transformer/flexibert.py",  # kinds of attention
}
"""Files whose `kind` is one of a value that they define themselves."""
ASKED = {
    "lmnas/cli/bench/options.py": "hasattr(os, 'sched_getaffinity')",  # of the operating system
    "lmnas/nn/kernels/library.py": "hasattr(library, 'gnu_get_libc_version')",  # of the C library
    "lmnas/core/settings.py": "getattr(owner, 'model_fields', {})",  # of a pydantic model or anything else
}
"""Members looked up by name where there is no class of ours to have a default."""


def told(places):
    """One line a place."""
    return "\n".join(f"{file}:{line}: {text}" for file, line, text in places)


def test_nobody_switches_on_a_kind():
    """What must be known of a component is said by an attribute of it."""
    found = [place for place in CHECKOUT.places(HOUSE.kind_switches) if place[0] not in OWN_KINDS]
    assert not found, told(found)


def test_nobody_names_a_component_but_its_own_file():
    """Lists of names in other files go stale."""
    found = HOUSE.strangers(CHECKOUT, own=SAID)
    assert not found, told(found)


def test_no_member_is_optional():
    """A base class has a default instead."""
    found = [place for place in CHECKOUT.places(HOUSE.optional_members) if ASKED.get(place[0]) != place[2]]
    assert not found, told(found)

"""The state of the house: what a checkout's source says about rooms, imports, leaks and lengths.

    python benchmarks/house.py CHECKOUT [CHECKOUT] [--json] [--places]

Everything is read from the source by `ast`; nothing is imported. Two checkouts stand side by side, before and after.
`--places` lists file and line of what was counted.
"""

import argparse
import ast
import io
import json
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FACE = ("__init__", "__main__")
"""Modules beside the rooms: the public face, imported by nobody."""
LONGEST = 60
"""Lines of a function, from `def` to its end."""
COMPARED_KINDS = ("space", "strategy", "estimator", "task")
"""Kinds of components that both sides have; names of other kinds (`test`, `adam`) are everyday words of the code."""
Place = tuple[str, int, str]
"""(file, line, what is there)"""


class Checkout:
    """The package `lmnas` and the tests below a folder, parsed."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.package = self.folder / "lmnas"
        if not self.package.is_dir():
            raise SystemExit(f"{folder}: no package lmnas there")
        self.files = {path: path.read_text(encoding="utf-8") for path in sorted(self.package.rglob("*.py"))}
        self.trees = {path: ast.parse(source) for path, source in self.files.items()}
        self.tests = {path: path.read_text(encoding="utf-8") for path in sorted((self.folder / "tests").rglob("*.py"))}
        self.components = self._components()

    def _components(self) -> dict[str, dict[str, str]]:
        """kind -> name -> `module:Class`, the literal in the registry's file."""
        for path, tree in self.trees.items():
            if path.name == "registry.py":
                for node in tree.body:
                    target = node.target if isinstance(node, ast.AnnAssign) else None
                    if isinstance(target, ast.Name) and target.id == "COMPONENTS" and node.value:
                        return ast.literal_eval(node.value)
        raise SystemExit(f"{self.folder}: no registry.py with COMPONENTS")

    def name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def module(self, path: Path) -> str:
        """Dotted name of a file's module."""
        parts = path.relative_to(self.folder).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def part(self, module: str) -> str:
        """The name under lmnas/ that a module belongs to; empty: the public face."""
        own = module.split(".")[1:2]
        return own[0] if own and own[0] not in FACE else ""

    def imports(self) -> Iterator[tuple[str, str]]:
        """(importing module, imported module) within the package, those inside functions as well."""
        modules = {self.module(path) for path in self.files}
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                found: list[str] = []
                if isinstance(node, ast.Import):
                    found = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    # `from lmnas.core import files` imports the module lmnas.core.files
                    dotted = [f"{node.module}.{alias.name}" for alias in node.names]
                    found = [name if name in modules else node.module for name in dotted]
                for name in found:
                    if name in modules and name != self.module(path):
                        yield self.module(path), name

    def places(self, search: Callable[[ast.AST], Iterator[tuple[int, str]]]) -> list[Place]:
        return [(self.name(path), line, text) for path, tree in self.trees.items() for line, text in search(tree)]


# ----------------------------------------------------------------------------------------------------- what is counted


def arrows(checkout: Checkout) -> list[tuple[str, str]]:
    """(part, part) between different parts, each once; the public face has none."""
    pairs = {(checkout.part(a), checkout.part(b)) for a, b in checkout.imports()}
    return sorted((a, b) for a, b in pairs if a and b and a != b)


def circles(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Groups of two or more that all reach each other."""
    reached: dict[str, set[str]] = {}
    for start in {name for pair in pairs for name in pair}:
        seen, edge = set(), [start]
        while edge:
            for a, b in pairs:
                if a == edge[-1] and b not in seen:
                    seen.add(b)
                    edge.insert(0, b)
            edge.pop()
        reached[start] = seen
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in reached}
    return sorted(list(group) for group in groups if len(group) > 1)


def kind_switches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Comparisons and matches by a kind: `x.kind != y`, `spec["kind"] == ...`, `kind == "text"`, `match x.kind`."""

    def is_kind(node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript):
            return isinstance(node.slice, ast.Constant) and node.slice.value == "kind"
        # of parameters of functions, in `inspect`
        return isinstance(node, ast.Attribute) and node.attr == "kind" and ast.unparse(node) != "parameter.kind"

    for node in ast.walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [node.subject]
        named = any(isinstance(side, ast.Name) and side.id == "kind" for side in sides)
        text = any(
            (isinstance(side, ast.Constant) and isinstance(side.value, str))
            or (isinstance(side, ast.Name) and side.id.isupper())
            for side in sides
        )
        if any(map(is_kind, sides)) or (named and (text or isinstance(node, ast.Match))):
            yield node.lineno, ast.unparse(node).splitlines()[0]


def optional_members(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`getattr` and `hasattr` with a literal name."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
            and len(node.args) > 1
            and isinstance(node.args[1], ast.Constant)
        ):
            yield node.lineno, ast.unparse(node)


def loose_mappings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """`dict[str, Any]`"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node) == "dict[str, Any]":
            yield node.lineno, "dict[str, Any]"


def long_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST:
                yield node.lineno, f"{node.name}: {lines} lines"


def strangers(
    checkout: Checkout, kinds: tuple[str, ...] = COMPARED_KINDS, own: Mapping[str, frozenset[str]] | None = None
) -> list[Place]:
    """Names of components of `kinds` as text, and imports of their classes, outside their own file and the registry.

    Args:
        own: further names that a file may have as words of its own, by the file's name.
    """
    homes: dict[str, set[str]] = {}
    for kind in kinds:
        for name, target in checkout.components.get(kind, {}).items():
            homes.setdefault(name, set()).add(target.partition(":")[0])
    classes = {target for kind in kinds for target in checkout.components.get(kind, {}).values()}
    found = []
    for path, tree in checkout.trees.items():
        if path.name == "registry.py":
            continue
        allowed = (own or {}).get(checkout.name(path), frozenset())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in allowed:
                home = homes.get(node.value)
                if home and checkout.module(path) not in home:
                    found.append((checkout.name(path), node.lineno, repr(node.value)))
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if f"{node.module}:{alias.name}" in classes and alias.name not in allowed:
                        found.append((checkout.name(path), node.lineno, f"import {alias.name}"))
    return found


def ignored_types(checkout: Checkout) -> list[Place]:
    found = []
    for path, source in checkout.files.items():
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and "type: ignore" in token.string:
                found.append((checkout.name(path), token.start[0], token.string))
    return found


def lines(sources: Mapping[Path, str]) -> int:
    return sum(source.count("\n") for source in sources.values())


def survey(folder: Path) -> dict[str, Any]:
    """Name of a count -> number, or the places where it was found."""
    checkout = Checkout(folder)
    parts = {checkout.part(checkout.module(path)) for path in checkout.files} - {""}
    between = arrows(checkout)
    files = sorted(set(checkout.imports()))
    return {
        "files of the package": len(checkout.files),
        "lines of the package": lines(checkout.files),
        "files of tests": len(checkout.tests),
        "lines of tests": lines(checkout.tests),
        "names under lmnas/": len(parts),
        "import arrows between them": len(between),
        "circles among them": [("", 0, " ".join(circle)) for circle in circles(between)],
        "circles among files": [("", 0, " ".join(circle)) for circle in circles(files)],
        "switches on a kind": checkout.places(kind_switches),
        "names of strangers": strangers(checkout),
        "optional members by getattr, hasattr": checkout.places(optional_members),
        "type: ignore": ignored_types(checkout),
        "dict[str, Any]": checkout.places(loose_mappings),
        f"functions over {LONGEST} lines": checkout.places(long_functions),
    }


def count(value: int | list[Place]) -> int:
    return value if isinstance(value, int) else len(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--places", action="store_true", help="file and line of what was counted")
    options = parser.parse_args()
    surveys = [survey(folder) for folder in options.checkouts]
    if options.json:
        shown = surveys if options.places else [{key: count(value) for key, value in s.items()} for s in surveys]
        print(json.dumps({str(folder): s for folder, s in zip(options.checkouts, shown, strict=True)}))
        return
    for key in surveys[0]:
        print(f"{key:<40}" + "".join(f"{count(s[key]):>10}" for s in surveys))
        for s in surveys if options.places else ():
            if isinstance(s[key], list):
                print("".join(f"    {file}:{line}: {text}\n" for file, line, text in s[key]), end="")


if __name__ == "__main__":
    main()

"""What the documents say works: their Python runs, their commands exist, their links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

import lmnas
import lmnas.runs.recipe
from lmnas.cli.main import bench_parser, main, parse_overrides, parser
from lmnas.core.genotype import load_genotype
from lmnas.runs.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands():
    """Every `lmnas ...` line of a shell block, with the page it stands on; a backslash continues a line."""
    for page in PAGES:
        for block in blocks(page, "sh") + blocks(page, "console") + blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                while words and re.fullmatch(r"\w+=\S*", words[0]):  # VARIABLE=value before the command
                    words = words[1:]
                if words and Path(words[0]).name == "lmnas":
                    yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words[1:])}")


COMMANDS = list(commands())


def test_there_are_commands_to_check():
    given = [command.values[0] for command in COMMANDS]
    assert {words[0] for words in given} >= {"search", "list", "show", "test", "bench"}


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_right(words, tmp_path, monkeypatch, capsys):
    """Long ones are parsed and their recipe is loaded and checked; quick ones are run."""
    monkeypatch.chdir(tmp_path)
    if words[0] in ("list", "show"):
        assert main(words) == 0
        assert capsys.readouterr().out
        return
    options, rest = parser().parse_known_args(words)
    if words[0] == "search":
        overrides = parse_overrides(rest)
        if options.genotype and not options.genotype.endswith(".json"):
            overrides["genotype"] = options.genotype
            load_genotype(options.genotype)
        assert load_recipe(options.recipe, overrides).name
    elif words[0] == "bench":
        bench_parser(options.name).parse_args(options.rest)
    else:
        assert not rest


def test_make_targets_of_the_documents_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        name
        for page in PAGES
        for block in blocks(page, "sh")
        for name in re.findall(r"^make (\w+)", block, re.MULTILINE)
    }
    assert {"search", "test"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    broken = [t for t in targets if not t.startswith(("http://", "https://")) and not (page.parent / t).exists()]
    assert not broken


def test_the_readme_names_recipes_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:ptb|wikitext-2)-[\w-]+)`", text)) <= set(lmnas.runs.recipe.recipe_names())


# --------------------------------------------------------------------------------------------------- docs/python.md


@pytest.fixture
def place(tmp_path, monkeypatch, cache):
    """A folder with `my.txt`, where `quickstart` is a recipe of seconds."""
    # a word that only the test split has: the vocabulary then holds <unk>
    (tmp_path / "my.txt").write_text(tiny.text(150) + "zebra\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text(yaml.safe_dump(tiny.recipe("pydoc")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lmnas.runs.recipe, "RECIPES", tmp_path / "recipes")


def test_the_same_job_from_python(place, capsys):
    first, second = blocks(ROOT / "docs" / "python.md", "python")
    assert len(first.splitlines()) < 10
    found: dict = {}
    exec(first, found)
    sentence, score = capsys.readouterr().out.splitlines()
    assert sentence == found["run"].results["verdict"]["sentence"]
    assert 1 < float(score) < 100  # 19 words and <unk>: a uniform guess is 20
    exec(second, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{found['run'].genotype.id} runs/mine/report.html"
    assert len(lines) == 1 + len(found["run"].results["scores"])
    again = lmnas.search("quickstart", run="runs/mine", data="my.txt", overrides={"train.seeds": 1}, quiet=True)
    assert again.results["scores"] == found["run"].results["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["file", "stdin"])
def test_the_snippet_is_a_program_of_its_own_with_two_workers(way, place):
    """Workers import nothing of it: it needs no guard, nor a file at all; and a full standard error is no matter."""
    (snippet, _) = blocks(ROOT / "docs" / "python.md", "python")
    recipe = (Path.cwd() / "recipes" / "quickstart.yaml").resolve()
    program = snippet.replace('"quickstart"', repr(str(recipe))).replace('"train.seeds": 1', '"execution.workers": 2')
    assert program != snippet
    Path("program.py").write_text(program)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with open("program.py") as given, open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "program.py" if way == "file" else "-"],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=full,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
            timeout=300,
        )
    sentence, score = done.stdout.splitlines()
    assert done.returncode == 0 and sentence and 1 < float(score) < 100

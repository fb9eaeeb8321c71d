"""A run decides once which kernel it takes, and keeps it."""

import json
from functools import partial

import killing
import pytest
import tiny
import torch
import yaml
from killing import assert_same, go, incidents

from lmnas.cli import main as cli
from lmnas.core.errors import UserError
from lmnas.core.events import read_events
from lmnas.nn.kernels import DEFAULT_CHUNK, current, decide, fused, kernel_in_use, use, using
from lmnas.nn.kernels.fused import Fused
from lmnas.runs import build, driver, forecast, start
from lmnas.runs.directory import Run
from lmnas.runs.executors import inline
from lmnas.runs.experiment import Experiment
from lmnas.runs.kernel_choice import FILE, Pin, read_pin, write_pin
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe

SHORT = ("search",)


@pytest.fixture(autouse=True)
def world(cache):
    """Kernel, chunk and threads as they were, after the test."""
    threads = torch.get_num_threads()
    with using():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(tiny.text(150))
    return path


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(fused, "compiler", lambda: None)
    monkeypatch.setattr(fused, "load", fused.load.__wrapped__)
    fused.library_path.cache_clear()
    yield
    fused.library_path.cache_clear()


@pytest.fixture
def compiled():
    try:
        fused.load()
    except fused.Unavailable as problem:
        pytest.skip(f"no fused kernel: {problem}")


def recipe(text, kernel, **changes):
    return tiny.recipe(text, execution={"device": "cpu", "workers": 1, "threads": 1, "kernel": kernel}, **changes)


def kernels(path):
    """(pinned, recorded in environment.json, recorded in results.json)"""
    documents = [json.loads((path / name).read_text()) for name in (FILE, "environment.json", "results.json")]
    return documents[0]["kernel"], documents[1]["kernel"], documents[2]["environment"]["kernel"]


# --------------------------------------------------------------------------------------------------------- deciding


def test_auto_is_the_default(text):
    document = tiny.recipe(text)
    del document["execution"]
    assert load_recipe(document).execution.kernel == "auto"


@pytest.mark.parametrize(
    "cached, seconds, expected",
    [
        (True, 0.0, ("fused", "compiled already")),
        (False, 61.0, ("fused", "about 61 s of work at the plain kernel's speed pay for compiling")),
        (False, 59.0, ("reference", "about 59 s of work do not pay for compiling")),
    ],
)
def test_what_auto_means(monkeypatch, cached, seconds, expected):
    """Compiling pays from twice its 30 seconds on."""
    monkeypatch.setattr(Fused, "unavailable", lambda self: None)
    monkeypatch.setattr(fused, "is_cached", lambda: cached)
    assert fused.COMPILE_SECONDS == 30
    assert decide(lambda: seconds) == expected


def test_a_gpu_runs_the_reference(text, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "open_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(forecast, "available", lambda *arguments: 2**40)
    assert start.start(load_recipe(recipe(text, "auto")), tmp_path / "run").pin.kernel == "reference"


def test_auto_without_a_compiler_falls_back_and_says_so_once(text, tmp_path, no_compiler, capfd):
    path, document = tmp_path / "run", recipe(text, "auto")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    line = "kernel: the plain one runs, which is slower: no C++ compiler found (CXX, c++, g++, clang++)"
    for _ in range(2):  # the second start follows what is pinned
        assert cli.main(["search", str(tmp_path / "recipe.yaml"), "--run", str(path)]) == 0
    assert capfd.readouterr().err.count(line) == 1 and incidents(path) == [line]
    assert kernels(path) == ("reference",) * 3
    assert "no C++ compiler" in read_pin(path).why


def test_a_compiler_that_fails_is_no_compiler_for_auto(text, tmp_path, monkeypatch):
    def broken():
        raise fused.Unavailable("g++ failed: out of registers")

    monkeypatch.setattr(fused, "load", broken)
    monkeypatch.setattr(start, "decide", lambda seconds: ("fused", "pays"))
    go(tmp_path / "run", recipe(text, "auto"), SHORT)
    assert kernels(tmp_path / "run") == ("reference",) * 3
    assert [message for message in incidents(tmp_path / "run") if "out of registers" in message]


def test_compiling_is_announced_before_any_job(text, tmp_path, monkeypatch, capfd):
    """And in the driver, so that no worker compiles."""
    steps = []
    monkeypatch.setattr(start, "decide", lambda seconds: ("fused", "pays"))
    monkeypatch.setattr(start, "must_compile", lambda kernel: kernel == "fused")
    monkeypatch.setattr(fused, "load", lambda: steps.append("compiled"))
    monkeypatch.setattr(driver.Driver, "executing", lambda self: steps.append("workers") or partial_stop())
    with Run(tmp_path / "run", load_recipe(recipe(text, "auto"))) as run, Display() as display, pytest.raises(Stop):
        Experiment(run, display).run_stages(SHORT)
    assert steps == ["compiled", "workers"]
    assert capfd.readouterr().err.count("compiling the fused kernel, about 15 s, once") == 1


class Stop(Exception):
    pass


def partial_stop():
    raise Stop


def test_fused_asked_for_without_a_compiler_leaves_no_run(text, tmp_path, no_compiler, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(text, "reference")))
    command = ["search", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run"), "--kernel", "fused"]
    assert cli.main(command) == 2
    assert "kernel 'fused': no C++ compiler found" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_option_is_checked(text, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(text, "reference")))
    assert cli.main(["search", str(tmp_path / "recipe.yaml"), "--kernel", "fusd"]) == 2
    line = capsys.readouterr().err
    assert "execution.kernel: 'fusd' is unknown. Did you mean 'fused'?" in line


def test_a_run_by_the_segment_kernel(text, tmp_path, compiled):
    """Through the command line: search, selection and training give what the reference gives, to rounding, and a
    second run gives the same bits; the run keeps its kernel."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(text, "auto")))
    losses = {}
    for run, kernel in (("plain", "reference"), ("one", "segment"), ("two", "segment")):
        path = tmp_path / run
        assert cli.main(["search", str(tmp_path / "recipe.yaml"), "--run", str(path), "--kernel", kernel]) == 0
        assert kernels(path) == (kernel,) * 3 and incidents(path) == []
        losses[run] = [
            event["train_loss"]
            for events in sorted(path.glob("jobs/*/events.jsonl"))
            for event in read_events(events)
            if event["event"] == "epoch"
        ]
    assert losses["one"] == losses["two"] != losses["plain"]
    assert losses["one"] == pytest.approx(losses["plain"], rel=1e-3)


def test_spaces_without_the_kernel_refuse_it(text, tmp_path, capsys):
    estimator = {"name": "standalone", "training": tiny.training()}
    document = recipe(text, "segment", space={"name": "lstm"}, estimator=estimator)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document))
    assert cli.main(["search", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run")]) == 2
    assert "kernel 'segment': neither space 'lstm' nor task 'language-modeling' has one" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- keeping


def test_a_run_keeps_its_kernel_whatever_auto_says_later(text, tmp_path, monkeypatch):
    go(tmp_path / "run", recipe(text, "reference"), SHORT)
    monkeypatch.setattr(start, "decide", lambda seconds: ("fused", "now it would"))
    go(tmp_path / "run", recipe(text, "auto"))
    assert kernels(tmp_path / "run") == ("reference",) * 3 and incidents(tmp_path / "run") == []
    assert kernel_in_use() == "reference"


@pytest.mark.parametrize("stage", ["select", "report"])
def test_single_stages_keep_it_too(stage, text, tmp_path, compiled):
    """`recipe.yaml` holds what the first start asked for; it does not win over the pin."""
    go(tmp_path / "run", recipe(text, "reference"), SHORT)
    write_pin(tmp_path / "run", Pin("fused", "asked for", DEFAULT_CHUNK))
    assert cli.main([stage, str(tmp_path / "run")]) == 0
    assert kernels(tmp_path / "run")[0::2] == ("fused", "fused")


def test_another_kernel_named_is_taken_and_noted(text, tmp_path, compiled):
    go(tmp_path / "run", recipe(text, "reference"), SHORT)
    go(tmp_path / "run", recipe(text, "fused"), ("search", "select"))
    assert kernels(tmp_path / "run") == ("fused",) * 3
    assert incidents(tmp_path / "run") == ["kernel: reference until now, fused from here on; last digits may differ"]
    go(tmp_path / "run", recipe(text, "auto"), ("select",))
    assert kernels(tmp_path / "run") == ("fused",) * 3


def test_a_pinned_kernel_that_is_gone_says_how_to_go_on(text, tmp_path, no_compiler):
    path = tmp_path / "run"
    go(path, recipe(text, "reference"), SHORT)
    write_pin(path, Pin("fused", "compiled already", DEFAULT_CHUNK))
    with pytest.raises(UserError) as refusal:
        go(path, recipe(text, "auto"))
    assert str(refusal.value) == (
        f"run {path} began with the fused kernel, which cannot be had now (no C++ compiler found (CXX, c++, g++, "
        f"clang++)); --kernel reference continues it with the plain kernel, whose sums differ in the last digits"
    )
    assert read_pin(path).kernel == "fused"
    go(path, recipe(text, "reference"))
    assert kernels(path) == ("reference",) * 3
    assert incidents(path) == ["kernel: fused until now, reference from here on; last digits may differ"]


def test_every_job_follows_the_pin(text, tmp_path, monkeypatch):
    """Kernel and chunk are set before a job's work, whatever the process did before."""
    seen = []
    monkeypatch.setattr(forecast, "fitting_chunk", lambda opened, needs, chunk: 77)
    monkeypatch.setattr(fused, "load", lambda: None)
    original = inline.Inline.run

    def spoiled(self, jobs):
        use(kernel="fused", chunk=99)
        for name, result in original(self, jobs):
            seen.append((kernel_in_use(), current().chunk))
            yield name, result

    monkeypatch.setattr(inline.Inline, "run", spoiled)
    go(tmp_path / "run", recipe(text, "reference"), SHORT)
    assert set(seen) == {("reference", 77)} and read_pin(tmp_path / "run").chunk == 77


def test_runs_from_before_there_were_pins_keep_their_kernel(text, tmp_path, monkeypatch):
    go(tmp_path / "run", recipe(text, "reference"), SHORT)
    (tmp_path / "run" / FILE).unlink()
    monkeypatch.setattr(start, "decide", lambda seconds: ("fused", "now it would"))
    go(tmp_path / "run", recipe(text, "auto"), SHORT)
    assert read_pin(tmp_path / "run") == Pin("reference", "as the run began", DEFAULT_CHUNK)


@pytest.mark.parametrize("content", ["{", "[]", '{"kernel": "fusd", "chunk": 5}', '{"kernel": "fused", "chunk": 0}'])
def test_a_broken_pin_is_named(content, text, tmp_path):
    go(tmp_path / "run", recipe(text, "reference"), SHORT)
    (tmp_path / "run" / FILE).write_text(content)
    with pytest.raises(UserError, match=r"kernel\.json: cannot be read .* delete it to choose the kernel anew"):
        go(tmp_path / "run", recipe(text, "reference"), SHORT)


# ---------------------------------------------------------------------------------------------- killed and continued


def test_killed_runs_of_the_fused_kernel_continue_exactly(text, tmp_path, monkeypatch, compiled):
    """Though `auto` would say something else at every later start."""
    gradient = {"strategy": {"name": "gradient", "learning_rate": 0.05}, "search": {"seeds": 1, "candidates": 1}}
    document = killing.recipe(text, **gradient, execution=recipe(text, "auto")["execution"])
    monkeypatch.setattr(start, "decide", lambda seconds: ("fused", "compiled already"))
    go(tmp_path / "reference", document)
    kills = [partial(killing.killed_at_boundary, number=number) for number in (30, 40, 50)]
    assert kills[0](lambda: go(tmp_path / "run", document))
    monkeypatch.setattr(start, "decide", lambda seconds: ("reference", "gone from the cache"))
    for kill in kills[1:]:
        assert kill(lambda: go(tmp_path / "run", document))
    go(tmp_path / "run", document)
    assert kernels(tmp_path / "run") == ("fused",) * 3
    assert_same(tmp_path / "run", tmp_path / "reference")


@pytest.mark.slow
def test_workers_of_a_fused_run_give_what_one_process_gives(text, tmp_path, compiled):
    document = killing.recipe(text, execution=recipe(text, "fused")["execution"])
    go(tmp_path / "inline", document)
    document["execution"]["workers"] = 2
    go(tmp_path / "workers", document)
    assert_same(tmp_path / "workers", tmp_path / "inline")

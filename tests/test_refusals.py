"""What a user gets wrong: one clear line, exit code 2, and nothing lost or left behind."""

import json
import os
from pathlib import Path

import pytest
import tiny
import yaml

import lmnas.core.files
from lmnas.cli.main import main
from lmnas.core.genotype import load_document
from lmnas.runs.directory import Run
from lmnas.runs.experiment import Experiment
from lmnas.runs.progress import Display
from lmnas.runs.recipe import load_recipe

UNTOUCHED = ("lock", "incidents.jsonl")
"""Files of a run that say who opened it: they may change, all others are results."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a text and a recipe for it."""
    monkeypatch.setenv("LMNAS_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("text.txt").write_text(tiny.text(150))
    write_recipe("tiny.yaml")
    return work


def write_recipe(path, **changes):
    Path(path).write_text(yaml.safe_dump(tiny.recipe(Path("text.txt").resolve(), **changes)))


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name not in UNTOUCHED}


@pytest.fixture
def refused(folder, capsys):
    """Run a command that must be refused; gives its one line."""

    def run(*arguments, leaves_no_trace=True):
        capsys.readouterr()
        before = contents()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("lmnas: ") and err.count("\n") == 1 and "Traceback" not in err
        if leaves_no_trace:
            assert contents() == before and not Path("runs").exists()
        return err.removeprefix("lmnas: ").strip()

    return run


COMMANDS = [
    (["search", "quickstrat"], "recipe 'quickstrat': neither a file nor a shipped recipe. Did you mean 'quickst"),
    (["search", ""], "recipe '': neither a file nor a shipped recipe"),
    (["search", "x" * 5000], "neither a file nor a shipped recipe"),
    (["search", "."], "recipe '.': neither a file nor a shipped recipe"),
    (["show", "darts-v7"], "genotype 'darts-v7': neither a file nor a shipped name. Did you mean 'darts-v"),
    (["show", "x" * 5000], "neither a file nor a shipped name"),
    (["show", "."], "cannot be read"),
    ([], "required: COMMAND"),
    (["serch"], "invalid choice: 'serch'"),
    (["search"], "required: recipe"),
    (["list", "speces"], "invalid choice: 'speces'"),
    (["list", "spaces", "stray"], "unexpected argument 'stray'"),
    (["search", "tiny.yaml", "stray"], "unexpected argument 'stray'"),
    (["train", "nowhere", "--train.seeds", "3"], "unexpected argument '--train.seeds'"),
    (["show", "darts-v2", "--width", "0"], "--width: expected at least 1, got 0"),
    (["show", "darts-v2", "--vocabulary", "0"], "--vocabulary: expected at least 1, got 0"),
    (["show", "darts-v2", "--vocabulary", "-3"], "--vocabulary: expected at least 1, got -3"),
    (["show", "darts-v2", "--width", "ten"], "argument --width: invalid int value: 'ten'"),
    (["show", "darts-v2", "--width", str(10**12)], "no machine holds a model that large"),
]
SETTINGS = [
    # unknown names: the nearest one is offered
    (["--space", "recurent-cell"], "space 'recurent-cell' is unknown. Did you mean 'recurr"),
    (["--strategy", "reinforse"], "strategy 'reinforse' is unknown. Did you mean 'reinforc"),
    (["--estimator", "shard"], "estimator 'shard' is unknown. Did you mean 'shared'?"),
    (["--task", "language"], "task 'language' is unknown. Did you mean 'language-modeling'"),
    (["--task.data", "wikitxt-2"], "data 'wikitxt-2' is neither"),
    (["--genotype", "darts-v3"], "Did you mean 'darts-v2'?"),
    (["--trian.seeds", "3"], "trian: unknown setting. Did you mean 'train'?"),
    (["--train.seed", "3"], "train.seed: unknown setting. Did you mean 'seeds'?"),
    (["--train.training.epoch", "3"], "unknown setting. Did you mean 'epochs'?"),
    (["--train.training.model.widht", "8"], "unknown setting. Did you mean 'width'?"),
    (["--baselines.lstm.sorce", "x"], "unknown setting. Did you mean 'source'?"),
    (["--space.nodes", "3"], "space.nodes: unknown setting. Did you mean 'n_nodes'?"),
    (["--baselines.foo.source", "lstm-9"], "genotype 'lstm-9': neither a file nor a shipped"),
    (["--space.activations", "[tnh]"], "activation 'tnh' is unknown. Did you mean 'tanh'?"),
    (["--execution.device", "tpu"], "execution.device 'tpu': not usable here"),
    (["--execution.device", "cuda:99"], "execution.device 'cuda:99': not usable here"),
    (["--execution.device", "meta"], "execution.device 'meta'"),
    (["--run"], "argument --run: expected one argument"),
    (["--train.seeds"], "--train.seeds: a value is missing"),
    (["--seed", "--train.seeds", "3"], "--seed: a value is missing before --train.seeds"),
    (["--strategy", "random", "--strategy", "gradient"], "--strategy: given twice"),
    (["--data", "a", "--task.data", "b"], "--data and --task.data: give one of them"),
    (["--seed", "[1"], "--seed: '[1' is not a YAML value"),
    (["--train.", "3"], "expected a dotted name"),
    (["--baselines..source", "random"], "expected a dotted name"),
    (["--train.seeds", "-1"], "train.seeds: input should be greater than or equal to 1, got -1"),
    (["--train.seeds", "0"], "got 0"),
    (["--train.seeds", "1.5"], "train.seeds: input should be a valid integer"),
    (["--train.seeds", "three"], "train.seeds: input should be a valid integer"),
    (["--train.seeds", "true"], "train.seeds: expected a number, got True"),
    (["--train.training.model.width", "-8"], "model.width: input should be greater than"),
    (["--train.training.model.width", "[8]"], "model.width: input should be a valid integer"),
    (["--train.training.model.width", "yes"], "model.width: expected a number, got True"),
    (["--train.training.model.decoder_bias", "1"], "expected true or false, got 1"),
    (["--train.training.batches.batch_size", "0"], "batch_size: input should be greater than"),
    (["--train.training.batches.bptt", "-1"], "batches.bptt: input should be greater than"),
    (["--train.training.epochs", "0"], "train.training.epochs: input should be greater than"),
    (["--train.training.optimizer.learning_rate", ".nan"], "finite number, got nan"),
    (["--train.training.optimizer.clip", ".inf"], "finite number, got inf"),
    (["--train.training.model.dropout_input", "1.0"], "input should be less than 1, got 1.0"),
    (["--seed", "-1"], "seed: input should be greater than or equal to 0"),
    (["--level", "0"], "level: input should be greater than 0"),
    (["--level", "1"], "level: input should be less than 1"),
    (["--space.n_nodes", "0"], "space.n_nodes: input should be greater than"),
    (["--space.n_nodes", str(10**9)], "space.n_nodes: input should be less than or equal to 64"),
    (["--space.activations", "[]"], "space.activations: tuple should have at least 1 item"),
    (["--space.activations", "[tanh, tanh]"], "each may stand once, got tanh, tanh"),
    (["--space.output", "all"], "space.output: input should be 'all-nodes' or 'loose-ends'"),
    (["--train", "3"], "train: expected a mapping of settings, got 3"),
    (["--baselines.foo", "random"], "baselines.foo: expected a mapping of settings"),
    (["--strategy", "[random]"], "strategy: expected a mapping of settings, got ['random']"),
    (["--train.seeds.x", "3"], "train.seeds is a value, it has no setting 'x'"),
    (["--name", "a/b"], "name: expected a name that can be part of a file name, got 'a/b'"),
    (["--name", ".."], "name: expected a name that can be part of a file name, got '..'"),
    (["--baselines.a/b.source", "random"], "baselines: expected a name that can be part of"),
    (["--train.training.model.width", str(10**9)], "train.training.model: no machine holds"),
    (["--estimator.training.model.width", str(10**6)], "estimator.training: needs about"),
    # what does not fit the text
    (["--train.training.batches.bptt", "300"], "train.training.batches: bptt 300: longer than"),
    (["--estimator.training.batches.bptt", "300"], "that split 'train' has at batch_size 4"),
    (["--estimator.training.batches.bptt", "30"], "that split 'valid' has at batch_size 4"),
    (["--train.training.batches.batch_size", "9999"], "train.training.batches: batch_size 9999"),
    (["--estimator.valid_batch_size", "99"], "split 'valid' has only"),
    (["--task.max_vocabulary", "1"], "task.max_vocabulary: input should be greater than"),
    (["--task.min_count", "9999"], "expected at least 2"),
    # settings that contradict each other
    (["--select.epochs", "5"], "select.epochs 5: longer than the final training"),
    (["--baselines.searched.source", "random"], "baselines.searched: this name belongs to"),
    (["--baselines.lstm.model.width", "8"], "match_parameters chooses the width"),
    (["--genotype", "lstm-1"], "is of space 'lstm'; this recipe's space is 'recurrent-cell'"),
    (["--space", "lstm"], "estimator 'shared' needs a space with a relaxation; space 'lstm' has none"),
    (["--space", "lstm", "--strategy", "gradient"], "'gradient' needs a space with a relax"),
    (["--task.level", "char", "--task.tokenizer", "words"], "given with level 'char'"),
]


@pytest.mark.parametrize("arguments, message", [*COMMANDS, *((["search", "tiny.yaml", *s], m) for s, m in SETTINGS)])
def test_refused(refused, arguments, message):
    assert message in refused(*arguments)


def test_a_strategy_without_the_shared_weights_it_needs(refused):
    line = refused("search", "tiny.yaml", "--strategy", "gradient", "--estimator", "standalone")
    assert "strategy 'gradient' needs mixture and shared-weights" in line and "estimator 'standalone'" in line
    assert line.endswith("Estimators that do: shared.")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"\xff\xfe\x00\x01 binary", "is not UTF-8 text"),
        (b"text\0with a zero", "is not UTF-8 text: NUL byte at offset 4"),
        (b"only ten words stand in this text, not one more\n", "expected at least 20"),
        (b"a " * 500, "split of"),
        (b"\n" * 500, "split of"),
        (("word\n" * 500).encode(), "expected at least 2"),
    ],
)
def test_text(refused, content, message):
    Path("bad.txt").write_bytes(content)
    assert message in refused("search", "tiny.yaml", "--data", "bad.txt")


def test_folder_without_its_files(refused):
    Path("data").mkdir()
    assert "folder data lacks its train file" in refused("search", "tiny.yaml", "--data", "data")
    Path("data/train.txt").write_text(tiny.text(100))
    Path("data/valid.txt").write_text(tiny.text(100))
    assert "folder data lacks its test file" in refused("search", "tiny.yaml", "--data", "data")


def test_a_split_of_ten_words(refused):
    Path("data").mkdir()
    for split in ("train", "valid"):
        Path(f"data/{split}.txt").write_text(tiny.text(100))
    Path("data/test.txt").write_text("ten words are not enough to say how good it\n")
    assert "the test split of data has 11 tokens; expected at least 20" in refused(
        "search", "tiny.yaml", "--data", "data"
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a: [1", "not YAML"),
        (b"- 1\n- 2\n", "expected a mapping of sections, got list"),
        (b"", "expected a mapping of sections, got NoneType"),
        (bytes(range(256)), "cannot be read"),
        (b"!!python/object/apply:os.system ['true']", "not YAML"),
        (b"1: 2\n", "missing"),
    ],
)
def test_recipe_file(refused, content, message):
    Path("bad.yaml").write_bytes(content)
    assert message in refused("search", "bad.yaml")


@pytest.mark.parametrize(
    "section, value, message",
    [
        ("strateggy", {}, "strateggy: unknown setting. Did you mean 'strategy'?"),
        ("task", None, "task: expected a mapping of settings, got None"),
        ("strategy", ["random"], "strategy: expected a mapping of settings, got ['random']"),
        ("strategy", 3, "strategy: expected a mapping of settings, got 3"),
        ("strategy", {"name": ["random"]}, "strategy ['random'] is unknown"),
        ("strategy", {"name": "random", 3: 4}, "strategy.3"),
        ("space", {"n_nodes": 2}, "space: 'name' is missing"),
        ("estimator", {"name": "shared"}, "estimator.training: missing"),
        ("estimator", {"name": "shared", "training": [1]}, "estimator.training: expected a mapping of settings"),
        ("estimator", {"name": "shared", "training": tiny.training(model={})}, "training.model.width: missing"),
        ("train", {}, "train.training: missing"),
        ("train", {"training": 3}, "train.training: expected a mapping of settings, got 3"),
        ("search", [], "search: expected a mapping of settings, got []"),
        ("baselines", None, "baselines: expected a mapping of settings, got None"),
    ],
)
def test_recipe_section(refused, section, value, message):
    write_recipe("bad.yaml", **{section: value})
    assert message in refused("search", "bad.yaml")


def test_recipe_without_a_section(refused):
    document = yaml.safe_load(Path("tiny.yaml").read_text())
    for section in ("task", "space", "strategy", "estimator", "train"):
        Path("bad.yaml").write_text(yaml.safe_dump({k: v for k, v in document.items() if k != section}))
        assert refused("search", "bad.yaml") == f"{section}: missing, it has no default"


@pytest.mark.parametrize("section", ["strategy", "estimator"])
def test_a_broken_section_is_replaced_by_a_name_or_refused(refused, section):
    write_recipe("bad.yaml", **{section: [1]})
    assert f"{section} 'randam' is unknown" in refused("search", "bad.yaml", f"--{section}", "randam")
    assert f"{section} is a value" in refused("search", "bad.yaml", f"--{section}.name", "random")


# ------------------------------------------------------------------------------------------------------- genotypes


def edited(**changes):
    """The choices of a cell of two nodes, edited by hand; None takes a decision out."""
    choices = {
        "node_0.activation": "tanh",
        "node_1.input": 0,
        "node_1.activation": "relu",
        "node_2.input": 1,
        "node_2.activation": "tanh",
        "output": "all-nodes",
    }
    choices = {k: v for k, v in (choices | changes).items() if v is not None}
    return {"format": 1, "space": "recurrent-cell", "choices": choices}


GENOTYPES = [
    (edited(**{"node_2.inptu": 1}), "unknown decision 'node_2.inptu'. Did you mean 'node_2.input'?"),
    (edited(**{"node_2.activation": None}), "decision 'node_2.activation' is missing"),
    (edited(**{"node_1.input": None}), "unknown decision 'node_2.input'"),
    (edited(**{"node_2.input": 2}), "node_2.input: 2 is not one of 0, 1"),
    (edited(**{"node_2.input": 7}), "node_2.input: 7 is not one of 0, 1"),
    (edited(**{"node_2.input": -1}), "node_2.input: -1 is not one of 0, 1"),
    (edited(**{"node_2.input": True}), "node_2.input: True is not one of 0, 1"),
    (edited(**{"node_2.input": "1"}), "node_2.input: '1' is not one of 0, 1"),
    (edited(**{"node_2.input": 1.0}), "node_2.input: 1.0 is not one of 0, 1"),
    (edited(**{"node_2.input": [1]}), "node_2.input: [1] is not one of 0, 1"),
    (edited(**{"node_2.activation": "tahn"}), "'tahn' is not one of"),
    (edited(output="both"), "'both' is not one of all-nodes, loose-ends"),
    ({**edited(), "format": 9}, "format 9 is unknown, this version reads format 1"),
    ({**edited(), "format": True}, "format True is unknown"),
    ({**edited(), "space": "recurent-cell"}, "space 'recurent-cell' is unknown. Did you mean 'recurrent-cell'?"),
    ({**edited(), "space": 3}, "'space' must be a name"),
    ({**edited(), "choices": []}, "'choices' an object"),
    ({"format": 1, "space": "recurrent-cell"}, "missing 'choices'"),
    ([edited()], "expected a JSON object with 'space' and 'choices', got list"),
    ({"format": 1, "space": "lstm", "choices": {"layers": 99}}, "layers: 99 is not one of"),
]


@pytest.mark.parametrize("document, message", GENOTYPES)
def test_genotype_edited_by_hand(refused, document, message):
    Path("cell.json").write_text(json.dumps(document))
    assert message in refused("show", "cell.json")


@pytest.mark.parametrize("document, message", [case for case in GENOTYPES if case[0] != GENOTYPES[-1][0]][:7])
def test_genotype_edited_by_hand_in_a_search(refused, document, message):
    Path("cell.json").write_text(json.dumps(document))
    assert message in refused("search", "tiny.yaml", "--genotype", "cell.json")
    assert message in refused("search", "tiny.yaml", "--baselines.cell.source", "cell.json")


@pytest.mark.parametrize("content", [b'{"format": 1, "spa', b"", b"\xff\xfe", b"[" * 100_000])
def test_genotype_that_is_not_json(refused, content):
    Path("cell.json").write_bytes(content)
    assert "not JSON" in refused("show", "cell.json")
    assert "not JSON" in refused("search", "tiny.yaml", "--genotype", "cell.json")


def test_a_genotype_that_cannot_say_whether_it_has_a_bias(refused):
    Path("cell.json").write_text(json.dumps({**load_document("darts-v2"), "decoder_bias": "no"}))
    assert "decoder_bias: expected true or false, got 'no'" in refused("show", "cell.json")


# -------------------------------------------------------------------------------------------------- run directories


def test_run_directory_that_is_a_file(refused):
    Path("taken").write_text("mine")
    assert "run taken: cannot be written" in refused("search", "tiny.yaml", "--run", "taken")
    assert Path("taken").read_text() == "mine"


def test_unwritable_run_directory(refused, monkeypatch):
    make = Path.mkdir

    def sealed(path, *arguments, **settings):  # tests may run as root, who may write anywhere
        if "sealed" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *arguments, **settings)

    monkeypatch.setattr(Path, "mkdir", sealed)
    assert "run sealed/run: cannot be written (Permission denied)" in refused(
        "search", "tiny.yaml", "--run", "sealed/run"
    )
    assert "--out sealed: pictures cannot be written (Permission denied)" in refused(
        "show", "darts-v2", "--out", "sealed"
    )


def test_full_disk(refused, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lmnas.core.files, "WRITE_ATTEMPTS", 1)
    monkeypatch.setattr(os, "replace", full)
    line = refused("search", "tiny.yaml", "--run", "full", leaves_no_trace=False)
    assert "No space left on device" in line


@pytest.mark.parametrize("stage", ["select", "train", "test", "report"])
def test_a_stage_where_there_is_no_run(refused, stage):
    for path in ("nowhere", "."):
        assert f"run {path}: no run there (recipe.yaml is missing)" in refused(stage, path)
    assert "no run there" in refused(stage, "text.txt")
    assert not Path("nowhere").exists()


def stages(path, *names):
    with Run(Path(path), load_recipe("tiny.yaml")) as run, Display(quiet=True) as display:
        return Experiment(run, display).run_stages(names)


def test_stages_that_come_too_early(refused):
    stages("run")
    documents = contents()
    assert "no candidates yet; run the search stage first" in refused("select", "run", leaves_no_trace=False)
    assert "run the search stage first" in refused("train", "run", leaves_no_trace=False)
    assert "run the search stage first" in refused("test", "run", leaves_no_trace=False)
    assert contents().keys() == documents.keys() | {Path("run/study.db")}
    stages("run", "search")
    before = contents()
    assert "is not finished; run the stages before this one first" in refused("train", "run", leaves_no_trace=False)
    assert "is not finished; run the stages before this one first" in refused("test", "run", leaves_no_trace=False)
    assert contents().keys() == before.keys()
    stages("run", "select")
    assert "job train-searched-0 is not finished" in refused("test", "run", leaves_no_trace=False)


def test_an_existing_run_is_left_as_it_was(refused):
    stages("run", "search")
    again = ("search", "tiny.yaml", "--run", "run")
    assert "run run holds another experiment: train.seeds is 2 there and 5 here" in refused(
        *again, "--train.seeds", "5"
    )
    assert "strategy.name is 'random' there and 'reinforce' here" in refused(*again, "--strategy", "reinforce")
    assert "holds another experiment: name is 'tiny' there" in refused("search", "quickstart", "--run", "run")
    assert "is unknown" in refused(*again, "--strategy", "randam")


def test_a_run_whose_text_was_edited_is_left_as_it_was(refused):
    stages("run", "search")
    Path("text.txt").write_text(tiny.text(151))
    assert "the data found now has" in refused("search", "tiny.yaml", "--run", "run")
    assert "the data found now has" in refused("select", "run")


def test_a_run_whose_recipe_was_damaged(refused):
    stages("run")
    Path("run/recipe.yaml").write_text("strategy: [")
    assert "recipe run/recipe.yaml: not YAML" in refused("select", "run")
    assert "recipe run/recipe.yaml: not YAML" in refused("search", "tiny.yaml", "--run", "run")


def test_all_candidates_fail(folder, capsys):
    # beyond float32: every weight overflows at the first update, whatever the machine's rounding
    hopeless = ["--estimator.training.optimizer.learning_rate", "1e300"]
    assert main(["search", "tiny.yaml", *hopeless]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lmnas: search: every candidate failed (diverged at step 1")
    assert Path("runs/tiny/results.json").exists()


# --------------------------------------------------------------------------------------------------------- images


def write_image_recipe(**changes):
    data = tiny.pictures(Path("pictures").resolve(), n_train=8)
    Path("images.yaml").write_text(yaml.safe_dump(tiny.image_recipe(data, **changes)))


IMAGES = [
    (["--task.classes", "100"], "task.classes 100: pictures has 3 classes"),
    (["--task.valid", "24"], "task.valid 24: pictures has 24 training images; expected 1 to 23"),
    (["--task.data", "cifar"], "data 'cifar' is neither a known image set nor an existing archive or folder. Did you"),
    (["--data", "text.txt"], "not a .tar.gz archive, or damaged"),
    (
        ["--space", "recurrent-cell"],
        "task 'image-classification' takes image bodies; space 'recurrent-cell'",
    ),
    (
        ["--task", "language-modeling"],
        "takes causal sequence bodies; space 'resnet' makes image bodies",
    ),
    (
        ["--baselines.lstm.source", "lstm-1"],
        "baselines.lstm: task 'image-classification' takes image bodies; space 'lstm'",
    ),
    (
        ["--estimator", "proxy"],
        "takes sequence bodies; space 'resnet' makes image bodies",
    ),
    (["--kernel", "fused"], "kernel 'fused': neither space 'resnet' nor task 'image-classification' has one"),
    (["--space.max_blocks", "19"], "space.max_blocks: input should be less than or equal to 18, got 19"),
    (["--train.training.model.auxiliary", "0.4"], "model.auxiliary: the head reads a map of 2 x 2 pixels"),
    (["--train.training.batches.batch_size", "23"], "train.training.batches: batch_size 23: split 'train' has only 22"),
    (["--train.training.batches.n_valid", "24"], "24 images held out for validation; pictures has 24 for both"),
    (["--train.training.batches.bptt", "3"], "train.training.batches.bptt: unknown setting"),
]


@pytest.mark.parametrize("arguments, message", IMAGES)
def test_images(refused, arguments, message):
    write_image_recipe()
    assert message in refused("search", "images.yaml", *arguments)


def test_switches_of_convolutional_cells(refused):
    write_image_recipe(space={"name": "darts-conv", "cells": 3})
    overrides = ["--strategy", "bayes", "--estimator", "shared"]
    assert "'bayes': the batch norms of convolutional cells undo" in refused("search", "images.yaml", *overrides)


def test_commands_for_text_refuse_image_networks(refused):
    assert "no metric is defined for image bodies, which space" in refused("score", "resnet-20")
    assert "--vocabulary: genotype resnet-20 is a network for images" in refused(
        "show", "resnet-20", "--vocabulary", "9"
    )


def test_a_norm_that_hides_the_size_of_switches(refused):
    message = refused("search", "tiny.yaml", "--strategy", "bayes")
    assert message.startswith("strategy 'bayes': space.batch_norm 'nodes': expected 'none'")

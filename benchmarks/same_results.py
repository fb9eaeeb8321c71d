"""Do two checkouts give the same bits? Tiny recipes run in both; scores, genotypes, trials and weights are compared.

    python benchmarks/same_results.py OLD NEW                  all cases, the quick start of both tasks too (an hour)
    python benchmarks/same_results.py OLD NEW --quick          without the quick starts (about ten minutes a side)
    python benchmarks/same_results.py OLD . --quick --keep /tmp/same --only text/recurrent-cell

OLD and NEW are folders that hold the package `lmnas`. The cases: every space x strategy x estimator, those included
that a checkout refuses (both must), then optimisers, schedules, dropout, averaging, workers, kernels, metrics,
published tables (where LMNAS_DATA has them), compression, single stages, and the quick starts.

`--keep DIR` keeps what OLD gave, so that it runs once; a case that was changed here runs anew. `OLD OLD` only fills
DIR. `--only TEXT` takes the cases whose names contain it. A side is one process: each command runs in a forked child
as `python -m lmnas` would.

Compared: exit codes, every JSON document and line of events that a run leaves (NEW may have further keys), the values,
parameters and notes of all trials in study.db, the names of all jobs, the SHA-256 of every *.safetensors. Not compared:
times, versions, the wording of sentences, and what is left by a search that both refuse (NEW may refuse sooner). Exit
code 1 where something differs.
"""

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SPACES: dict[str, dict[str, Any]] = {
    "recurrent-cell": {"n_nodes": 2, "batch_norm": "none"},
    "recurrent-sparse": {"n_nodes": 2},
    "recurrent-graph": {"intermediate_nodes": 4},
    "lstm": {"max_layers": 2},
    "recurrent-layers": {"max_layers": 2},
    "resnet": {"max_blocks": 2},
    "enas-macro": {"layers": 3},
    "enas-micro": {"cells": 4, "n_nodes": 2},
    "darts-conv": {"cells": 3, "n_nodes": 2},
}
IMAGE_SPACES = ("resnet", "enas-macro", "enas-micro", "darts-conv")
STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {},
    "reinforce": {"hidden": 8, "rewards_per_round": 4, "rewards_per_update": 2},
    "gradient": {"learning_rate": 0.05},
    "bayes": {"strength": 0.001, "learning_rate": 5.0, "updates": 2, "curvature_batches": 1},
}
ESTIMATORS = ("standalone", "shared", "proxy", "hidden-covariance")
TEXT = "the a cat dog bird house tree sees likes finds eats near under big small red old and"
NOT_RESULTS = ("environment.json", "incidents.jsonl", "model.json", "kernel.json", "job.json")
"""Documents that describe the machine or the program, not the results."""
TIMES = {"seconds", "tokens_per_second", "images_per_second", "costs", "environment", "time", "run", "report", "out"}
"""Keys whose values are the wall clock's or name a place."""
WORDS = {"sentence", "failure", "reason", "message", "description"}
"""Keys whose values are prose: only whether there is some is compared."""
PRELOADED = (
    "torch._dynamo",
    "torch.utils.flop_counter",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "optuna.storages",
    "optuna.storages._rdb.storage",
    "alembic.command",
    "scipy.stats",
    "networkx",
    "safetensors.torch",
    "rich.progress",
    "yaml",
)
SECONDS = 1200
"""A command that takes longer counts as failed."""


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """Commands that run one after the other in a folder of their own.

    Attributes:
        recipe: written to recipe.yaml (JSON is YAML); None: the commands need none.
        commands: arguments of `lmnas`; the run directory is `run`.
        files: further files, name -> content.
        needs: a path below LMNAS_DATA without which the case is left out.
        slow: a whole quick start.
    """

    name: str
    recipe: dict[str, Any] | None = None
    commands: tuple[tuple[str, ...], ...] = (("search", "recipe.yaml", "--run", "run", "--json"),)
    files: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    slow: bool = False


def text_training(optimizer: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **changes: Any) -> Any:
    return {
        "epochs": 1,
        "model": {"width": 6, **(model or {})},
        "batches": {"batch_size": 4, "bptt": 10, "test_batch_size": 2, "eval_batch_size": 2},
        "optimizer": {"learning_rate": 1.0, "averaging": "none", **(optimizer or {})},
        **changes,
    }


def text_recipe(**changes: Any) -> dict[str, Any]:
    """The whole job on the drawn text; `changes` replace whole sections."""
    return {
        "name": "same",
        "task": {"name": "language-modeling", "data": "../world/text.txt"},
        "space": {"name": "recurrent-cell", **SPACES["recurrent-cell"]},
        "strategy": {"name": "random"},
        "estimator": {"name": "shared", "training": text_training()},
        "search": {"seeds": 1, "candidates": 2, "batch": 2},
        "select": {"keep": 2, "epochs": 1, "seeds": 1},
        "train": {"seeds": 1, "training": text_training()},
        "baselines": {"lstm": {"source": "lstm-1"}},
        "execution": {"device": "cpu", "workers": 1, "threads": 1, "kernel": "reference"},
        **changes,
    }


def image_training(optimizer: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "epochs": 1,
        "model": {"width": 2},
        "batches": {"batch_size": 6, "crop": 1},
        "optimizer": {"learning_rate": 0.05, "momentum": 0.9, "clip": 5.0, "averaging": "none", **(optimizer or {})},
        **changes,
    }


def image_recipe(**changes: Any) -> dict[str, Any]:
    """The whole job on drawn pictures of 8 x 8 pixels; `changes` replace whole sections."""
    return {
        "name": "same-images",
        "task": {"name": "image-classification", "data": "../world/pictures"},
        "space": {"name": "resnet", **SPACES["resnet"]},
        "strategy": {"name": "random"},
        "estimator": {"name": "standalone", "training": image_training()},
        "search": {"seeds": 1, "candidates": 2, "batch": 2},
        "select": {"keep": 1, "epochs": 1, "seeds": 1},
        "train": {"seeds": 1, "training": image_training()},
        "baselines": {},
        "execution": {"device": "cpu", "workers": 1, "threads": 1},
        **changes,
    }


def space(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, **SPACES[name], **settings}


def strategy(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, **STRATEGIES[name], **settings}


def product() -> Iterator[Case]:
    """Every space x strategy x estimator."""
    for space_name in SPACES:
        images = space_name in IMAGE_SPACES
        training = image_training() if images else text_training()
        for strategy_name in STRATEGIES:
            for estimator in ESTIMATORS:
                recipe = (image_recipe if images else text_recipe)(
                    space=space(space_name),
                    strategy=strategy(strategy_name),
                    estimator={"name": estimator, "training": training},
                )
                if strategy_name in ("gradient", "bayes"):
                    recipe["search"] = {"seeds": 1, "candidates": 1}
                task = "images" if images else "text"
                yield Case(f"{task}/{space_name}/{strategy_name}/{estimator}", recipe)


DROPOUT = {
    "dropout_embedding": 0.1,
    "dropout_input": 0.2,
    "dropout_x": 0.1,
    "dropout_hidden": 0.2,
    "dropout_output": 0.3,
    "ar": 0.01,
    "tar": 0.01,
}
OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"weight_decay": 1e-4},
    "momentum": {"momentum": 0.5, "weight_decay": 1e-4},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "adam": {"method": "adam", "learning_rate": 0.01, "weight_decay": 1e-4},
    "cosine": {"schedule": "cosine", "learning_rate_min": 0.1},
    "restarts": {"schedule": "cosine", "restart_epochs": 1, "restart_factor": 2},
    "decay": {"decay": 0.5, "decay_from": 1},
    "no-clip": {"clip": None},
    "averaging": {"learning_rate": 10.0, "averaging": "nonmonotonic", "patience": 1},
    "averaging-adam": {"method": "adam", "learning_rate": 0.05, "averaging": "nonmonotonic", "patience": 1},
    "averaging-from": {"learning_rate": 10.0, "averaging": "nonmonotonic", "patience": 1, "averaging_from": 15.0},
}


def trainings() -> Iterator[Case]:
    """Optimisers, schedules, averaging, dropout and batches: in the supernet, alone, and in retraining."""
    for name, optimizer in OPTIMISERS.items():
        long = text_training(optimizer, epochs=4)
        train = {"seeds": 2, "training": long}
        yield Case(f"optimizer/{name}/shared", text_recipe(estimator={"name": "shared", "training": long}, train=train))
        image = image_training({**optimizer, "learning_rate": 0.02, "learning_rate_min": 0.0}, epochs=3)
        yield Case(f"optimizer/{name}/images", image_recipe(train={"seeds": 2, "training": image}))
    for estimator in ("shared", "standalone"):
        searching = text_training(model=DROPOUT, epochs=2)
        fitting = text_training({"patience": 1, "averaging": "nonmonotonic"}, DROPOUT, epochs=3)
        fitting["batches"] |= {"length_std": 2.0, "short_probability": 0.2}
        recipe = text_recipe(
            estimator={"name": estimator, "training": searching}, train={"seeds": 2, "training": fitting}
        )
        yield Case(f"dropout/{estimator}", recipe)
    weight = text_training(model={"dropout_weight": 0.3, "dropout_output": 0.2, "decoder_bias": False})
    yield Case(
        "dropout/weight",
        text_recipe(
            space={"name": "recurrent-layers", "max_layers": 3, "units": [4, 8]},
            estimator={"name": "standalone", "training": weight},
            train={"seeds": 1, "training": weight},
            baselines={"lstm": {"source": "lstm-3", "model": {"dropout_weight": 0.5}}, "random": {"source": "random"}},
        ),
    )
    part = text_training()
    part["batches"]["max_train_tokens"] = 300
    yield Case("batches/few-tokens", text_recipe(estimator={"name": "standalone", "training": part}))
    scored = {"name": "shared", "training": text_training(), "valid_batch_size": 2, "score_segments": 2}
    yield Case("batches/shared-segments", text_recipe(estimator=scored, strategy=strategy("reinforce")))
    augmented = image_training(epochs=2, model={"width": 2, "dropout": 0.2, "drop_path": 0.3, "label_smoothing": 0.1})
    augmented["batches"] |= {"cutout": 3, "flip": True, "augment_valid": True, "n_valid": 9}
    for name in ("darts-conv", "enas-macro"):
        shared = {"name": "shared", "training": augmented}
        yield Case(
            f"augment/{name}",
            image_recipe(space=space(name), estimator=shared, train={"seeds": 1, "training": augmented}),
        )
    few = image_training()
    few["batches"] |= {"max_train_images": 24, "max_valid_images": 12, "batch_size": 12, "crop": 4}
    for name in ("darts-conv", "resnet"):
        yield Case(
            f"shapes/{name}",
            image_recipe(
                task={"name": "image-classification", "data": "shapes"},
                space=space(name),
                estimator={"name": "standalone", "training": few},
                train={"seeds": 1, "training": few},
                baselines={"resnet": {"source": "resnet-8"}},
            ),
        )
    auxiliary = {"name": "image-classification", "data": "../world/large"}
    for name in ("darts-conv", "enas-macro"):
        training = image_training(model={"width": 2, "auxiliary": 0.4, "drop_path": 0.2})
        yield Case(
            f"auxiliary/{name}",
            image_recipe(task=auxiliary, space=space(name), train={"seeds": 1, "training": training}),
        )


def searches() -> Iterator[Case]:
    """Settings of spaces and strategies beside their defaults."""
    cells: dict[str, dict[str, Any]] = {
        "nodes-norm": {"batch_norm": "nodes"},
        "edge-sharing": {"sharing": "edge", "n_nodes": 3},
        "no-none": {"none": False, "n_nodes": 3},
        "loose-ends": {"output": "loose-ends", "n_nodes": 3},
    }
    for name, settings in cells.items():
        for by in ("random", "gradient"):
            yield Case(
                f"cell/{name}/{by}", text_recipe(space=space("recurrent-cell", **settings), strategy=strategy(by))
            )
    yield Case("gradient/second-order", text_recipe(strategy=strategy("gradient", order=2)))
    yield Case(
        "gradient/second-order/momentum",
        text_recipe(
            strategy=strategy("gradient", order=2),
            estimator={"name": "shared", "training": text_training({"momentum": 0.5}, DROPOUT)},
        ),
    )
    for name in ("darts-conv", "enas-micro", "enas-macro"):
        shared = {"name": "shared", "training": image_training()}
        yield Case(
            f"gradient/second-order/{name}",
            image_recipe(space=space(name), strategy=strategy("gradient", order=2), estimator=shared),
        )
    priors: dict[str, dict[str, Any]] = {
        "edge-cap": {"prior": "edge-cap"},
        "independent-product": {"prior": "independent", "convention": "product"},
        "edge-groups": {"groups": "edge", "ranking": "influence"},
        "recursion": {"curvature": "recursion"},
        "gauss-newton": {"curvature": "gauss-newton"},
        "hutchinson": {"curvature": "hutchinson"},
        "exact": {"curvature": "exact"},
    }
    for name, settings in priors.items():
        yield Case(f"bayes/{name}", text_recipe(strategy=strategy("bayes", **settings)))
    policy = {"locality": None, "subset_penalty": 0.8, "baseline_start": "zero", "tanh_constant": None}
    yield Case("reinforce/settings", text_recipe(strategy=strategy("reinforce", **policy)))
    shared = {"name": "shared", "training": image_training()}
    macro = strategy("reinforce", subset_penalty=0.8)
    yield Case("reinforce/macro", image_recipe(space=space("enas-macro"), strategy=macro, estimator=shared))
    yield Case("random/repeated", text_recipe(strategy={"name": "random", "distinct": False}))
    many = {"seeds": 2, "candidates": 4, "batch": 2}
    for by in ("random", "reinforce", "gradient", "bayes"):
        recipe = text_recipe(
            strategy=strategy(by), search=many, select={"keep": 2, "epochs": 1, "seeds": 2}, seed=7,
            baselines={"random": {"source": "random"}, "enas": {"source": "enas", "match_parameters": False}},
        )  # fmt: skip
        yield Case(f"seeds/{by}", recipe)


def executions() -> Iterator[Case]:
    """Workers and kernels."""
    for workers in (1, 2):
        for by, estimator in (("random", "standalone"), ("reinforce", "shared"), ("random", "proxy")):
            recipe = text_recipe(
                strategy=strategy(by),
                estimator={"name": estimator, "training": text_training(model=DROPOUT)},
                search={"seeds": 2, "candidates": 4, "batch": 2},
                train={"seeds": 2, "training": text_training(model=DROPOUT)},
                execution={"device": "cpu", "workers": workers, "threads": 1, "kernel": "reference"},
            )
            yield Case(f"workers-{workers}/{by}/{estimator}", recipe)
        images = image_recipe(train={"seeds": 2, "training": image_training()})
        images["execution"]["workers"] = workers
        yield Case(f"workers-{workers}/images", images)
    for kernel in ("reference", "fused"):
        for space_name in ("recurrent-cell", "recurrent-sparse", "recurrent-layers"):
            for by, settings, estimator in (
                ("random", {}, "standalone"),
                ("reinforce", {}, "shared"),
                ("gradient", {}, "shared"),
                ("gradient", {"order": 2}, "shared"),
                ("bayes", {}, "shared"),
            ):
                if estimator == "shared" and space_name == "recurrent-layers":
                    continue
                recipe = text_recipe(
                    space=space(space_name),
                    strategy=strategy(by, **settings),
                    estimator={"name": estimator, "training": text_training(model=DROPOUT)},
                    train={"seeds": 1, "training": text_training(model={**DROPOUT, "width": 8}, epochs=2)},
                    execution={"device": "cpu", "workers": 1, "threads": 1, "kernel": kernel},
                )
                order = f"-{settings['order']}" if settings else ""
                yield Case(f"kernel-{kernel}/{space_name}/{by}{order}/{estimator}", recipe)
    norm = text_recipe(space=space("recurrent-cell", batch_norm="nodes"), strategy=strategy("gradient"))
    norm["execution"]["kernel"] = "fused"
    yield Case("kernel-fused/batch-norm", norm)


def scores() -> Iterator[Case]:
    """Metrics without training, published tables, pictures of genotypes."""
    for name in ("recurrent-cell", "recurrent-graph", "recurrent-layers", "lstm", "recurrent-sparse", "flexibert"):
        size = () if name == "flexibert" else ("--width", "8")
        for workers in ("1", "2") if name == "recurrent-cell" else ("1",):
            command = ("score", "--sample", "2", "--space", name, "--metrics", "all", "--data", "../world/text.txt")
            yield Case(
                f"score/{name}/workers-{workers}",
                commands=((*command, *size, "--seed", "3", "--workers", workers, "--json"),),
            )
    for metric in ("predictor", "jacobian_cosine", "synaptic_saliency", "activation_distance", "operations"):
        estimator = {"name": "proxy", "metric": metric, "training": text_training()}
        for name in ("recurrent-graph", "recurrent-cell"):
            yield Case(f"proxy/{metric}/{name}", text_recipe(space=space(name), estimator=estimator))
    for members in (None, "nas-bench-nlp"):
        graph = space("recurrent-graph", members=members)
        for by in ("random", "reinforce"):
            recipe = text_recipe(
                space=graph,
                strategy=strategy(by),
                estimator={"name": "table"},
                search={"seeds": 1, "candidates": 6, "batch": 3},
            )
            yield Case(f"table/{members or 'drawn'}/{by}", recipe, needs="nas-bench-nlp")
    for genotype in ("darts-v2", "lstm-3", "enas-micro", "enas-macro", "nas-bench-nlp-lstm", "resnet-8"):
        yield Case(f"show/{genotype}", commands=(("show", genotype, "--out", "pictures", "--json"),))


def stages() -> Iterator[Case]:
    """Compression, given genotypes, stages one by one."""
    for cell, choices in (("lstm", {"layers": 1}), ("recurrent-layers", {"cell": "rnn", "layers": 1})):
        training = text_training({"learning_rate": 5.0}, {"width": 8, "dropout_output": 0.1}, epochs=4)
        recipe = text_recipe(
            space={"name": cell}, genotype="genotype.json", train={"seeds": 1, "training": training}, baselines={}
        )
        small = ("--rounds", "2", "--round-epochs", "2", "--epochs", "1")
        for name, extra in (("evidence", ()), ("strength", ("--strength", "2e-5", "--pruning", "last", "--seed", "1"))):
            yield Case(
                f"compress/{cell}/{name}",
                recipe,
                (
                    ("search", "recipe.yaml", "--run", "run", "--json"),
                    ("compress", "run", "--out", "small", *small, *extra, "--json"),
                ),
                {"genotype.json": json.dumps({"format": 1, "space": cell, "choices": choices})},
            )
    for genotype in ("darts-v1", "nas-bench-nlp-gru", "lstm-3"):
        name = "recurrent-graph" if "gru" in genotype else "lstm" if "lstm" in genotype else "recurrent-cell"
        yield Case(f"genotype/{genotype}", text_recipe(space={"name": name}, genotype=genotype))
    again = (("select", "run", "--json"), ("train", "run", "--json"), ("test", "run", "--json"), ("report", "run"))
    yield Case("stages", text_recipe(), (("search", "recipe.yaml", "--run", "run", "--json"), *again))
    override = ("search", "recipe.yaml", "--run", "run", "--strategy", "reinforce", "--strategy.hidden", "4")
    yield Case(
        "overrides", text_recipe(), ((*override, "--strategy.rewards_per_round", "3", "--train.seeds=2", "--json"),)
    )
    for name in ("quickstart", "images-quickstart"):
        yield Case(f"whole/{name}", commands=(("search", name, "--run", "run", "--json"),), slow=True)


def cases() -> list[Case]:
    return [case for part in (product, trainings, searches, executions, scores, stages) for case in part()]


# --------------------------------------------------------------------------------------------------------------- world


def make_world(folder: Path) -> None:
    """The drawn text and pictures that all cases read."""
    if (folder / "ready-2").exists():
        return
    draws = random.Random(0)
    words = TEXT.split()
    folder.mkdir(parents=True, exist_ok=True)
    lines = (" ".join(draws.choice(words) for _ in range(6)) + "\n" for _ in range(150))
    (folder / "text.txt").write_text("".join(lines))
    draw_pictures(folder / "pictures", {"train": 10, "valid": 4, "test": 4}, 8, draws)
    draw_pictures(folder / "large", {"train": 3, "valid": 2, "test": 2}, 32, draws)
    (folder / "ready-2").touch()


def draw_pictures(folder: Path, splits: dict[str, int], size: int, draws: random.Random) -> None:
    """`n` noisy pictures of each of three colours per split: train/red/0.png, ..."""
    from PIL import Image

    for split, n in splits.items():
        for name, colour in {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (20, 60, 230)}.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(n):
                pixels = bytes(max(0, min(255, c + draws.randint(-60, 60))) for _ in range(size**2) for c in colour)
                Image.frombytes("RGB", (size, size), pixels).save(folder / split / name / f"{number}.png")


# -------------------------------------------------------------------------------------------------------- one checkout


def serve() -> None:
    """One side: a JSON line {case, folder} on standard input is answered by one with its outcome. PYTHONPATH names the
    checkout."""
    for module in PRELOADED:  # what takes seconds to import is inherited by all children
        importlib.import_module(module)

    warnings.simplefilter("ignore", DeprecationWarning)  # numpy's idle threads: nothing they hold is used in a child
    for line in sys.stdin:
        request = json.loads(line)
        answer = run_case(Case(**request["case"]), Path(request["folder"]))
        print(json.dumps(answer), flush=True)


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """The outcome of a case that runs in `folder`, which is made for it and taken away."""
    folder.mkdir()
    for name, content in case.files.items():
        (folder / name).write_text(content)
    if case.recipe is not None:
        (folder / "recipe.yaml").write_text(json.dumps(case.recipe))
    outcome: dict[str, Any] = {}
    for number, command in enumerate(case.commands):
        out, err = folder / f"stdout-{number}", folder / f"stderr-{number}"
        code = run_command(command, folder, out, err)
        outcome[f"exit code of {command[0]}"] = code
        if code == 0 and "--json" in command:
            outcome[f"answer of {command[0]}"] = json.loads(out.read_text())
        elif code:
            outcome["words"] = err.read_text()[-2000:]
            break
    outcome |= left_behind(folder)
    shutil.rmtree(folder)
    return json.loads(json.dumps(outcome).replace(str(folder), "FOLDER"))


def run_command(command: tuple[str, ...], folder: Path, out: Path, err: Path) -> int:
    """The exit code of `python -m lmnas COMMAND` in a forked child."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code: Any = 1
    try:
        signal.alarm(SECONDS)
        os.chdir(folder)
        for stream, path in ((sys.stdout, out), (sys.stderr, err)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream.fileno())
        sys.argv = ["lmnas", *command]
        checkout = Path(os.environ["PYTHONPATH"])
        module = "lmnas" if (checkout / "lmnas" / "__main__.py").exists() else "lmnas.cli"
        import lmnas

        assert Path(lmnas.__file__).is_relative_to(checkout), f"{lmnas.__file__} is not of {checkout}"
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    raise AssertionError


def left_behind(folder: Path) -> dict[str, Any]:
    """Documents, events, trials and digests of weights below a folder, by their paths."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in NOT_RESULTS or path.name == "recipe.yaml":
            continue
        if path.suffix == ".json" and path.name[0] != ".":
            found[name] = json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".db":
            found[name] = trials(path)
    jobs = folder / "run" / "jobs"
    found["jobs"] = sorted(path.name for path in jobs.iterdir()) if jobs.is_dir() else []
    return found


def trials(path: Path) -> dict[str, Any]:
    """Values, parameters and notes of all trials of a study.db."""
    connection = sqlite3.connect(path)
    try:
        rows = connection.execute(
            "select trial_id, study_name, number, state from trials join studies using (study_id) order by trial_id"
        ).fetchall()
        return {
            f"{study} {number}": {
                "state": state,
                "values": connection.execute(
                    "select objective, value, value_type from trial_values where trial_id = ? order by objective", (id,)
                ).fetchall(),
                "params": dict(
                    connection.execute(
                        "select param_name, param_value from trial_params where trial_id = ? order by param_name", (id,)
                    )
                ),
                "notes": {
                    key: json.loads(value)
                    for key, value in connection.execute(
                        "select key, value_json from trial_user_attributes where trial_id = ? order by key", (id,)
                    )
                },
            }
            for id, study, number, state in rows
        }
    finally:
        connection.close()


class Side:
    """A checkout and the process that runs its cases."""

    def __init__(self, checkout: Path, work: Path):
        self.checkout = checkout.resolve()
        label = hashlib.sha256(str(self.checkout).encode()).hexdigest()[:8]
        self.cache = work / f"cache-{label}"
        self.work = work / f"work-{label}-{os.getpid()}"  # several may work with one folder of outcomes
        if not (self.checkout / "lmnas" / "__init__.py").is_file():
            raise SystemExit(f"{checkout}: no package lmnas there")
        self.process: subprocess.Popen[str] | None = None

    def run(self, case: Case) -> dict[str, Any]:
        if self.process is None:
            self.work.mkdir(parents=True)
            (self.work / "world").symlink_to(self.work.parent / "world")
            environment = {
                **os.environ,
                "PYTHONPATH": str(self.checkout),
                "LMNAS_DATA": os.path.abspath(os.environ.get("LMNAS_DATA", "data")),
                "LMNAS_CACHE": str(self.cache),
                "XDG_CACHE_HOME": str(self.cache),
            }
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve"],
                env=environment,
                cwd=self.work,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self.process.stdin and self.process.stdout
        folder = self.work / re.sub(r"\W+", "-", case.name)
        print(json.dumps({"case": asdict(case), "folder": str(folder)}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.checkout}: the process that ran {case.name} ended")
        return json.loads(answer)

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin
            self.process.stdin.close()
            self.process.wait()
            shutil.rmtree(self.work)


# ---------------------------------------------------------------------------------------------------------- comparing


def difference(old: Any, new: Any, where: str = "") -> str | None:
    """The first place where `new` lacks something of `old` or has it otherwise; None: there is none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            place = f"{where} > {key}" if where else str(key)
            if key in TIMES or key == "words":
                continue
            if key not in new:
                return f"{place}: missing"
            if key in WORDS:
                if (value is None) != (new[key] is None):
                    return f"{place}: {value!r} became {new[key]!r}"
                continue
            found = difference(value, new[key], place)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{where}: {len(old)} items became {len(new)}"
        found_all = (difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next(filter(None, found_all), None)
    # as JSON: NaN equals NaN, 1 is not 1.0 and -0.0 not 0.0
    return None if json.dumps(old) == json.dumps(new) else f"{where}: {old!r} became {new!r}"


def kept(path: Path, case: Case) -> dict[str, Any] | None:
    """The outcome kept of a case, unless the case has changed since."""
    if path.is_file():
        document = json.loads(path.read_text())
        if document["case"] == json.loads(json.dumps(asdict(case))):
            return document["outcome"]
    return None


def compare(old: Path, new: Path, work: Path, taken: list[Case], say: Any = print) -> tuple[int, str | None]:
    """(cases run, the first difference). One line a case."""
    make_world(work / "world")
    sides = [Side(checkout, work) for checkout in (old, new)]
    first = None
    try:
        for case in taken:
            path = work / "outcomes" / (re.sub(r"\W+", "-", case.name) + ".json")
            expected = kept(path, case)
            if expected is None:
                expected = sides[0].run(case)
                path.parent.mkdir(exist_ok=True)
                beside = path.with_suffix(f".{os.getpid()}")  # another comparison may keep it at the same time
                beside.write_text(json.dumps({"case": asdict(case), "outcome": expected}))
                beside.replace(path)
            codes = {key: code for key, code in expected.items() if key.startswith("exit code")}
            refused = [code for code in codes.values() if code]
            found = None
            if old.resolve() != new.resolve():
                outcome = sides[1].run(case)
                found = difference(codes if refused == [2] else expected, outcome)
                if found and outcome.get("words"):
                    found += "\n    " + outcome["words"].strip().replace("\n", "\n    ")
            state = f"DIFFERENT: {found}" if found else f"equal (exit code {refused[0]})" if refused else "equal"
            say(f"{case.name}: {state}", flush=True)
            first = first or (found and f"{case.name}: {found}")
    finally:
        for side in sides:
            side.close()
    return len(taken), first


def main() -> int:
    if sys.argv[1:] == ["--serve"]:
        serve()
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--quick", action="store_true", help="without the quick starts")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names contain it")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what OLD gave there (default: nowhere)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    data = Path(os.environ.get("LMNAS_DATA", "data"))
    taken = [
        case
        for case in cases()
        if options.only in case.name
        and not (options.quick and case.slow)
        and (not case.needs or (data / case.needs).exists())
    ]
    if not taken:
        raise SystemExit(f"--only {options.only!r}: no case has it in its name")
    work = (options.keep or Path("same-results")).resolve()

    def say(line: str, flush: bool = True) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=flush)

    n, first = compare(options.old, options.new, work, taken, say)
    if options.keep is None:
        shutil.rmtree(work)
    if options.json:
        print(json.dumps({"cases": n, "equal": first is None, "difference": first}))
    else:
        print(f"{n} cases, all equal" if first is None else f"different: {first}")
    return 0 if first is None else 1


if __name__ == "__main__":
    sys.exit(main())

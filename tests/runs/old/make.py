"""Makes runs.tar.xz: run directories of version 0.1.0, finished and killed, and what undisturbed ones came to.

    git worktree add /tmp/0.1.0 dfded20
    PYTHONPATH=/tmp/0.1.0 python tests/runs/old/make.py

Version 0.1.0 is commit dfded20. The archive holds, for each name below, the user's recipe.yaml, a directory `run`
(killed by SIGKILL in the middle of a job, or finished), and outcome.json: what an undisturbed run left, as
`left_behind` of benchmarks/same_results.py reads it. Text and pictures are not in it: the test draws the same ones.
"""

import io
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "support"))

import tiny  # noqa: E402
from scripts import script  # noqa: E402

ARCHIVE = HERE / "runs.tar.xz"
SEARCHING = tiny.training(
    epochs=2,
    model={"width": 4, "dropout_x": 0.1, "dropout_output": 0.1},
    optimizer={"learning_rate": 2.0, "momentum": 0.3, "averaging": "none"},
    checkpoint_steps=4,
)
FITTING = tiny.training(
    epochs=4,
    model={"width": 4, "dropout_embedding": 0.1, "dropout_output": 0.2, "tar": 0.001},
    batches={"batch_size": 8, "bptt": 10, "eval_batch_size": 2, "test_batch_size": 2, "short_probability": 0.1},
    optimizer={"learning_rate": 10.0, "weight_decay": 1e-6, "patience": 1},
    checkpoint_steps=4,
)
CELL = {"name": "recurrent-cell", "n_nodes": 2, "batch_norm": "none"}
COMPRESS = ("compress", "run", "--out", "small", "--rounds", "2", "--round-epochs", "2", "--epochs", "1", "--json")


def recipe(strategy: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = {
        "space": CELL,
        "strategy": strategy,
        "estimator": {"name": "shared", "training": SEARCHING},
        "search": {"seeds": 1, "candidates": 1},
        "select": {"keep": 1},
        "train": {"seeds": 1, "training": FITTING},
        "baselines": {},
    }
    return tiny.recipe("text.txt", **{**settings, **changes})


def image_recipe() -> dict[str, Any]:
    training = {
        "epochs": 3,
        "model": {"width": 2, "dropout": 0.2, "drop_path": 0.3},
        "batches": {"batch_size": 4, "crop": 2, "cutout": 3},
        "optimizer": {"learning_rate": 0.05, "momentum": 0.9, "nesterov": True, "schedule": "cosine", "patience": 1},
        "checkpoint_steps": 4,
    }
    return tiny.image_recipe(
        "pictures",
        space={"name": "enas-macro", "layers": 2},
        estimator={"name": "standalone", "training": {**training, "epochs": 1}},
        search={"seeds": 1, "candidates": 1},
        select={"keep": 1},
        train={"seeds": 1, "training": training},
        baselines={},
    )


REINFORCE = {"name": "reinforce", "hidden": 4, "rewards_per_round": 4, "rewards_per_update": 2}
MANY = {"search": {"seeds": 1, "candidates": 3, "batch": 2}, "select": {"keep": 2}}
BASELINES = {"baselines": {"random": {"source": "random"}, "lstm": {"source": "lstm-1"}}}
WHOLE = recipe(REINFORCE, **MANY, **BASELINES)
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "finished": (WHOLE, ""),
    "training": (WHOLE, "train-searched-0"),
    "reinforce": (WHOLE, "search-0"),
    "random": (recipe({"name": "random"}), "search-0"),
    "gradient": (recipe({"name": "gradient", "order": 2, "learning_rate": 0.05}), "search-0"),
    "bayes": (recipe({"name": "bayes", "learning_rate": 5.0, "updates": 2, "curvature_batches": 1}), "search-0"),
    "standalone": (
        recipe({"name": "random"}, estimator={"name": "standalone", "training": SEARCHING}, **MANY),
        "search-0-trial-1",
    ),
    "images": (image_recipe(), "train-searched-0"),
    "compressed": (recipe({"name": "random"}, space={"name": "lstm", "max_layers": 1}, genotype="lstm-1"), "compress"),
}
"""name -> (recipe, the job in which it was killed; empty: it finished)"""


def world(folder: Path) -> None:
    """The text and pictures that the recipes name."""
    (folder / "text.txt").write_text(tiny.text(120))
    tiny.pictures(folder / "pictures", n_train=8)


def commands(name: str) -> list[tuple[str, ...]]:
    first = ("search", "recipe.yaml", "--run", "run", "--json")
    return [first, COMPRESS] if name == "compressed" else [first]


def run(command: tuple[str, ...], folder: Path, job: str) -> None:
    """`lmnas COMMAND` in a child, killed after the third checkpoint of `job`."""
    from lmnas.job import Job

    from lmnas.cli import main

    save = Job.save

    def deadly(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        if self.name == job and self._index == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        Job.save = deadly
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(command))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    killed = job == "compress" if command[0] == "compress" else job not in ("", "compress")
    assert code == (-signal.SIGKILL if killed else 0), (command, job, code)


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)
    same = script("same_results")
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive, tempfile.TemporaryDirectory() as scratch:
        os.environ["LMNAS_CACHE"] = f"{scratch}/cache"
        for name, (document, job) in RUNS.items():
            folder = Path(scratch) / name
            for stopped in ("", job):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                world(folder)
                (folder / "recipe.yaml").write_text(json.dumps(document))
                for command in commands(name):
                    run(command, folder, stopped)
                if not stopped:
                    outcome = json.dumps(same.left_behind(folder)).encode()
            for path in sorted(folder.glob("*/**/*")):
                if path.is_file() and path.name not in ("lock", "report.html") and path.suffix != ".png":
                    archive.add(path, path.relative_to(scratch))
            archive.add(folder / "recipe.yaml", f"{name}/recipe.yaml")
            entry = tarfile.TarInfo(f"{name}/outcome.json")
            entry.size = len(outcome)
            archive.addfile(entry, io.BytesIO(outcome))
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""`lmnas bench overhead`: what a training step takes outside of the network.

A real small training runs with the model's forward and autograd's backward timed from inside; all the rest is ours:
data, dropout masks, clipping and the optimiser, averaging, checkpoints, progress, events.
"""

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn

from lmnas.cli.bench.contract import Say
from lmnas.cli.bench.machine import processor
from lmnas.cli.bench.options import add_common, chosen_rows, settle_kernel, settle_threads
from lmnas.core.contracts import Task
from lmnas.core.genotype import load_genotype
from lmnas.core.job import Job
from lmnas.core.registry import component, create
from lmnas.core.text import columns
from lmnas.methods.estimators.shared import Shared
from lmnas.nn.train import fit, initialise
from lmnas.nn.training.settings import Optimizer, Training
from lmnas.report.plots import FAINT, MODEL_COLOURS, STYLE
from lmnas.runs.build import build_model
from lmnas.spaces.recurrent.cell import RecurrentCell

HELP = "time of a training step outside of the network"
WORDS, EPOCHS = 1000, 2


class Network:
    """Seconds inside of forward and backward, and how often the outermost of them were entered."""

    def __init__(self) -> None:
        self.seconds, self.inside = 0.0, False

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, began = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                self.inside = False

        return call

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, calls of `model` and of autograd are timed."""
        backward, grad = torch.autograd.backward, torch.autograd.grad
        model.forward = self.timed(model.forward)
        torch.autograd.backward, torch.autograd.grad = self.timed(backward), self.timed(grad)
        try:
            yield
        finally:
            torch.autograd.backward, torch.autograd.grad = backward, grad
            del model.forward  # the class' own comes back


def _settings(small: bool) -> Training:
    return Training(
        epochs=EPOCHS,
        model={"width": 16 if small else 64, "dropout_output": 0.2, "dropout_x": 0.1, "dropout_hidden": 0.1},
        batches={"batch_size": 16, "bptt": 10 if small else 35},
        optimizer=Optimizer(learning_rate=1.0),
    )


def _retrain(task: Task, training: Training, folder: Path) -> tuple[int, float, float]:
    device = torch.device("cpu")
    model = initialise(build_model(task, load_genotype("darts-v2"), training), 0)
    network = Network()
    began = time.perf_counter()
    with network.watching(model):
        result = fit(model, task, training, 0, Job(folder), device)
    return result["steps"], time.perf_counter() - began, network.seconds


def _search(strategy: str, **settings: Any) -> Callable[[Task, Training, Path], tuple[int, float, float]]:
    def train(task: Task, training: Training, folder: Path) -> tuple[int, float, float]:
        space = RecurrentCell()
        shared = Shared(space, task, 0, torch.device("cpu"), training=training)
        chosen = component("strategy", strategy)(space, task.objective, 0, **settings)
        network = Network()
        began = time.perf_counter()
        with network.watching(shared.model):
            shared.prepare(chosen, Job(folder))
        steps = EPOCHS * task.stream("train", training.batch_settings(task), 0).steps_per_epoch
        return steps, time.perf_counter() - began, network.seconds

    return train


ROWS: dict[str, Callable[[Task, Training, Path], tuple[int, float, float]]] = {
    "retrain": _retrain,
    "search-random": _search("random"),
    "search-first-order": _search("gradient", order=1),
    "search-second-order": _search("gradient", order=2),
}
"""Name -> a training: (steps, seconds, those of them inside of the network)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    names = chosen_rows(options.rows, ROWS)
    threads = settle_threads(options.threads)
    kernel = settle_kernel(options.kernel, say)
    training = _settings(options.small)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        task = _task(Path(folder), 3_000 if options.small else 40_000)
        for name in names:
            say(f"{name} ...")
            ROWS[name](task, training, Path(folder) / f"{name}-first")  # what is built at first use
            steps, seconds, network = ROWS[name](task, training, Path(folder) / name)
            rows.append(
                {
                    "row": name,
                    "steps": steps,
                    "step_microseconds": 1e6 * seconds / steps,
                    "network_microseconds": 1e6 * network / steps,
                    "overhead_microseconds": 1e6 * (seconds - network) / steps,
                    "overhead_share": (seconds - network) / seconds,
                }
            )
    return {
        "rows": rows,
        "kernel": kernel,
        "threads": threads,
        "width": training.model["width"],
        "batch_size": training.batches["batch_size"],
        "bptt": training.batches["bptt"],
        "processor": processor(),
        "torch": torch.__version__,
        "small": options.small,
    }


def _task(folder: Path, n_words: int) -> Task:
    """A text of random words; its token cache is beside it."""
    draws = random.Random(0)
    lines = [" ".join(f"w{draws.randrange(WORDS)}" for _ in range(10)) for _ in range(n_words // 10)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return create("task", {"name": "language-modeling", "data": str(folder / "text.txt")})


def text(document: dict[str, Any]) -> str:
    header = ("row", "steps", "step µs", "network µs", "outside µs", "outside")
    rows = [
        (
            row["row"],
            str(row["steps"]),
            f"{row['step_microseconds']:,.0f}",
            f"{row['network_microseconds']:,.0f}",
            f"{row['overhead_microseconds']:,.0f}",
            f"{row['overhead_share']:.1%}",
        )
        for row in document["rows"]
    ]
    place = (
        f"width {document['width']}, batch {document['batch_size']}, segments of {document['bptt']}; "
        f"kernel {document['kernel']}, {document['threads']} threads, {document['processor']}, "
        f"torch {document['torch']}"
    )
    return f"{columns(header, rows)}\n\n{place}"


def pictures(document: dict[str, Any], folder: Path) -> list[Path]:
    """`overhead.png`: a step's time, inside and outside of the network."""
    rows = document["rows"]
    inside = [row["network_microseconds"] / 1000 for row in rows]
    outside = [row["overhead_microseconds"] / 1000 for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 1.2 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, inside, color=MODEL_COLOURS["searched"], height=0.62, label="network")
        axes.barh(places, outside, left=inside, color=FAINT, height=0.62, label="outside")
        axes.set_yticks(places, [row["row"] for row in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("milliseconds a training step")
        axes.legend(loc="upper right")
        path = folder / "overhead.png"
        figure.savefig(path, dpi=150)
    return [path]

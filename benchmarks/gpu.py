"""Milliseconds a step and peak memory of the recurrent cell on one GPU: recorded graphs beside what they replace.

Rows are the steps of the papers' settings: search (width 300, batch 256, 8 nodes, mixture: weights alone, with the
first- and with the second-order architecture step), retraining (width 850, batch 64, DARTS V2), and ENAS'
shared step (width 1000, batch 64, 11 nodes, sampled paths). Each runs as

    graphs     forward and backward of the segment recorded (lmnas/nn/kernels/graphs.py)
    eager      the same operations one by one (lmnas/nn/kernels/passes.py)
    reference  plain autograd (lmnas/nn/kernels/reference.py)
    lstm       torch.nn.LSTM (cuDNN) of the same width, batch and softmax layer: a weight step, for scale

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --small            # a smoke test; its numbers mean nothing

`seconds_per_epoch` is the median step times the steps of one pass over Penn Treebank's training split (929,589 tokens),
validation left out. Ways are interleaved; steps begin and end with a synchronisation. Float32, no TF32. Random tokens.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lmnas.core.contracts import LearnStep
from lmnas.core.genotype import load_genotype
from lmnas.core.seeds import generator, rng
from lmnas.methods.strategies.gradient import architecture_gradient
from lmnas.nn.kernels import graphs, use
from lmnas.nn.kernels.choice import kernel_named
from lmnas.nn.kernels.passes import Eager
from lmnas.runs.build import covering_space
from lmnas.spaces.recurrent.cell import RecurrentCell
from lmnas.spaces.recurrent.layers import LSTM
from lmnas.tasks import language_modeling
from lmnas.tasks.language_modeling import LanguageModel, ModelSettings

PTB_TOKENS = 929_589
DROPOUT = {"dropout_output": 0.75, "dropout_x": 0.75, "dropout_hidden": 0.25, "dropout_input": 0.2}
WAYS = ("graphs", "eager", "reference", "lstm")


@dataclass(frozen=True)
class Size:
    """Sizes at which a row is measured; `bptt` in tokens."""

    width: int
    batch_size: int
    n_nodes: int
    vocabulary: int = 10_000
    bptt: int = 35

    def small(self) -> "Size":
        return Size(width=16, batch_size=4, n_nodes=min(self.n_nodes, 3), vocabulary=50, bptt=5)


SIZES = {
    "search-weight": Size(300, 256, 8),
    "search-first-order": Size(300, 256, 8),
    "search-second-order": Size(300, 256, 8),
    "retrain": Size(850, 64, 8),
    "enas-shared": Size(1000, 64, 11),
}


class Setting:
    """One model, two batches of random tokens, one draw of masks; an optimiser with a rate of zero, so that every
    step does the same work."""

    def __init__(self, body: torch.nn.Module, size: Size, device: torch.device, seed: int = 0, **settings):
        noise = generator(seed, "benchmark")
        self.model = LanguageModel(body, size.vocabulary, ModelSettings(width=size.width, **settings))
        self.model.initialise(noise)
        self.model.to(device)
        self.batches = []
        for _ in range(2):
            tokens = torch.randint(size.vocabulary, (size.bptt + 1, size.batch_size), generator=noise).to(device)
            state = body.initial_state(size.batch_size)
            self.batches.append(replace(language_modeling.segment(tokens), state=state))
        self.masks = self.model.draw_masks(self.batches[0], noise)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, weight_decay=5e-7)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.25, foreach=True)
        self.optimizer.step()

    def weight_step(self, choice=None) -> None:
        loss, _ = self.model(self.batches[0], self.masks, choice)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.update()


def search(order: int) -> Callable:
    def make(size: Size, device: torch.device) -> Callable[[], None]:
        space = RecurrentCell(n_nodes=size.n_nodes)
        setting = Setting(space.supernet(size.width), size, device, tar=1e-3, **DROPOUT)
        rows = space.n_nodes * (space.n_nodes + 1) // 2
        alphas = {"nodes": (1e-3 * torch.randn(rows, 5, generator=generator(0, "alpha"))).requires_grad_()}

        def relax(alphas):
            return {"nodes": alphas["nodes"].softmax(-1)}

        def loss(number: int) -> Callable:
            def run(weights, mixture):
                arguments = (setting.batches[number], setting.masks, mixture, False)
                return torch.func.functional_call(setting.model, dict(weights), arguments)[0]

            return run

        def step() -> None:
            if order > 0:
                weights = dict(setting.model.named_parameters())
                architecture_gradient(LearnStep(0, loss(0), loss(1), weights, 20.0, 5e-7, 0.25), alphas, relax, order)
            with torch.no_grad():
                fixed = {name: p.to(device) for name, p in relax(alphas).items()}
            setting.weight_step(fixed)

        return step

    return make


def _cell(size: Size) -> torch.nn.Module:
    genotype = load_genotype("darts-v2")
    if size.n_nodes != 8:
        space = RecurrentCell(n_nodes=size.n_nodes)
        return space.build(space.sample(rng(0, "small")), size.width)
    return covering_space(genotype).build(genotype, size.width)


def retrain(size: Size, device: torch.device) -> Callable[[], None]:
    return Setting(_cell(size), size, device, tar=1e-3, **DROPOUT).weight_step


def enas_shared(size: Size, device: torch.device) -> Callable[[], None]:
    space = RecurrentCell(
        n_nodes=size.n_nodes,
        input_activation="searched",
        output="loose-ends",
        sharing="edge",
        batch_norm="none",
        none=False,
    )
    setting = Setting(space.supernet(size.width), size, device, decoder_bias=False, **DROPOUT)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        setting.weight_step(space.sample(rng(0, "paths", count)))

    return step


def lstm(size: Size, device: torch.device) -> Callable[[], None]:
    space = LSTM()
    return Setting(space.build(load_genotype("lstm-1"), size.width), size, device).weight_step


ROWS: dict[str, Callable] = {
    "search-weight": search(0),
    "search-first-order": search(1),
    "search-second-order": search(2),
    "retrain": retrain,
    "enas-shared": enas_shared,
}


def choose(way: str) -> None:
    """Have the cell run in one way from here on."""
    use(kernel="segment" if way in ("graphs", "eager") else "reference")
    kernel_named("segment").chosen_runner = Eager() if way == "eager" else None


def ways_of(device: torch.device) -> list[str]:
    """Ways that can be measured on `device`: a CPU records no graphs."""
    return [way for way in WAYS if way != "graphs" or device.type != "cpu"]


def measure(name: str, size: Size, device: torch.device, ways: list[str], rounds: int) -> dict[str, dict]:
    """Way -> `milliseconds` (every round's), their median, `peak_bytes` above models and data, `seconds_per_epoch`."""
    steps = {way: (lstm if way == "lstm" else ROWS[name])(size, device) for way in ways}

    def seconds(way: str) -> float:
        choose(way)
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        steps[way]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    peaks = {}
    for way in ways:
        graphs.recorded.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        for _ in range(3):  # the second comes to be recorded, the third replays
            seconds(way)
        peaks[way] = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
    for way in ways:
        for _ in range(3):
            seconds(way)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way].append(1e3 * seconds(way))
    steps_per_epoch = PTB_TOKENS // (size.batch_size * size.bptt)
    results = {}
    for way in ways:
        median = statistics.median(times[way])
        results[way] = {
            "milliseconds": times[way],
            "median": median,
            "peak_bytes": peaks[way],
            "seconds_per_epoch": median * steps_per_epoch / 1e3,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--small", action="store_true", help="tiny sizes: whether it runs at all")
    parser.add_argument("--out", type=Path, help="file for all numbers as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu --small shows whether the script runs")
    rows = {}
    for name in options.rows.split(","):
        size = SIZES[name].small() if options.small else SIZES[name]
        rows[name] = {"size": asdict(size), "ways": measure(name, size, device, ways_of(device), options.rounds)}
        texts = [f"{way} {result['median']:.2f} ms" for way, result in rows[name]["ways"].items()]
        print(f"{name:20s} {'   '.join(texts)}", flush=True)
    document = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "small": options.small,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`lmnas bench conv`: networks of convolutional cells against the plain formulation of the papers' published codes.

Plain is: every operation of every edge by itself, dilated convolutions as PyTorch has them, images in the layout that
they come in (channels first). Both sides share weights and images and take a forward and a backward pass.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lmnas.cli.bench.cell import measure
from lmnas.cli.bench.contract import Say
from lmnas.cli.bench.machine import clock, processor
from lmnas.cli.bench.options import chosen_rows, positive, settle_device, settle_threads
from lmnas.cli.bench.rows import Row
from lmnas.core.contracts import Batch, Choice
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator, rng
from lmnas.core.text import columns
from lmnas.nn.ops.conv import DepthwiseSeparable, SeparableConv
from lmnas.report.plots import FAINT, MODEL_COLOURS, STYLE
from lmnas.runs.build import covering_space
from lmnas.spaces.conv.cells import DartsConv, EnasMicro
from lmnas.spaces.conv.network import Cell, Network, State, SupernetCell, SupernetNetwork, edges, first_edge, loose_ends

HELP = "speed of convolutional cells, ours against the published codes' formulation"
SIDE_SECONDS = 0.5


@dataclass(frozen=True)
class Sizes:
    """Channels, cells and pixels; the defaults are the papers'. The batch is smaller: a step takes seconds on a CPU."""

    darts_width: int = 16
    darts_cells: int = 8
    enas_width: int = 20
    enas_cells: int = 8
    width: int = 36
    batch: int = 16
    pixels: int = 32

    @classmethod
    def small(cls) -> "Sizes":
        return cls(2, 3, 2, 3, 2, batch=4, pixels=8)


# ------------------------------------------------------------------------------------------------------ the plain side


def plain_operation(operation: nn.Module, x: Tensor) -> Tensor:
    """Result of `operation(x)`, with PyTorch's own convolutions."""
    if isinstance(operation, SeparableConv):
        return plain_operation(operation.second, plain_operation(operation.first, x))
    if isinstance(operation, DepthwiseSeparable):
        return operation.norm(operation.pointwise(operation.depthwise(F.relu(x))))
    return operation(x)


def plain_features(network: Network, images: Tensor, choice: Choice = None) -> Tensor:
    """Result of `network(images, None, {}, choice)[0]`, without zeros for nodes that a path does not concatenate."""
    states: tuple[State, State] = ((network.stem(images), None),) * 2
    for cell in network.cells:
        states = states[1], _plain_cell(cell, states, choice)
    last = states[1][0]
    return (F.relu(last) if network.layout.final_relu else last).mean((2, 3))


def _plain_cell(cell: nn.Module, inputs: tuple[State, State], choice: Choice) -> State:
    if isinstance(cell, Cell):
        program, operations = cell.program, iter(cell.ops)
        values = cell.inputs(*inputs, program.reads)
        for node in program.nodes:
            values.append(_total(plain_operation(next(operations), values[source]) for source, _ in node))
        return torch.cat([values[node] for node in program.outputs], 1), None
    assert isinstance(cell, SupernetCell) and choice is not None
    space = cell.space
    if isinstance(choice, Genotype):
        program = space.programs(choice)[cell.place.kind]
        values = cell.inputs(*inputs, program.reads)
        for i, node in enumerate(program.nodes):
            chosen = [(cell.ops[cell.index(i, source, name)], source) for source, name in node]
            values.append(_total(plain_operation(operation, values[source]) for operation, source in chosen))
        found = [(node - 2) * cell.place.channels + c for node in program.outputs for c in range(cell.place.channels)]
        return torch.cat([values[node] for node in program.outputs], 1), torch.tensor(found, device=values[-1].device)
    weights = choice[cell.place.kind]
    weights = weights[:, weights.shape[1] - len(space.operations) :]
    values = cell.inputs(*inputs, {0, 1})
    for i in range(space.n_nodes):
        values.append(
            _total(
                weights[first_edge(i) + source, k]
                * plain_operation(cell.ops[cell.index(i, source, name)], values[source])
                for source in range(i + 2)
                for k, name in enumerate(space.operations)
            )
        )
    nodes = values[2:]
    if space.loose_ends:
        nodes = [share * node for share, node in zip(loose_ends(weights.sum(1), space.n_nodes), nodes, strict=True)]
    return torch.cat(nodes, 1), None


def _total(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total = total + term
    return total


# ---------------------------------------------------------------------------------------------------------- the rows


def _row(network: Network, sizes: Sizes, device: torch.device, choice: Choice = None) -> Row:
    network.initialise(generator(0, "weights"), 0.0)
    network.to(device)
    images = torch.randn(sizes.batch, 3, sizes.pixels, sizes.pixels, generator=generator(0, "images")).to(device)
    trained = list(network.parameters())

    def step(features: Callable[[], Tensor]) -> tuple[float, float]:
        """The mean square of the features and its gradient's norm."""
        loss = features().square().sum() / len(images)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return loss.item(), nn.utils.get_total_norm([g for g in gradients if g is not None]).item()

    return Row(
        lambda: step(lambda: network(images, None, {}, choice)[0]),
        lambda: step(lambda: plain_features(network, images, choice)),
        sizes.batch,
        model=network,
        batch=Batch(images, images[:, 0], sizes.batch),
        choice=choice,
    )


def _mixture(network: SupernetNetwork, space: DartsConv | EnasMicro, device: torch.device) -> dict[str, Tensor]:
    noise = generator(0, "alpha")
    return {
        table.name: torch.randn(len(edges(space.n_nodes)), len(table.ops), generator=noise).softmax(-1).to(device)
        for table in space.tables()
    }


def _darts_search(sizes: Sizes, device: torch.device) -> Row:
    space = DartsConv(search_cells=sizes.darts_cells)
    network = space.supernet(sizes.darts_width)
    return _row(network, sizes, device, _mixture(network, space, device))


def _enas_search(sizes: Sizes, device: torch.device) -> Row:
    space = EnasMicro(search_cells=sizes.enas_cells)
    return _row(space.supernet(sizes.enas_width), sizes, device, space.sample(rng(0, "path")))


def _retrain(name: str) -> Callable[[Sizes, torch.device], Row]:
    def make(sizes: Sizes, device: torch.device) -> Row:
        genotype = load_genotype(name)
        network = covering_space(genotype).build(genotype, sizes.width)
        assert isinstance(network, Network)
        return _row(network, sizes, device)

    return make


ROWS: dict[str, Callable[[Sizes, torch.device], Row]] = {
    "darts-search": _darts_search,
    "darts-retrain": _retrain("darts-conv-v2"),
    "enas-search": _enas_search,
    "enas-retrain": _retrain("enas-micro"),
}


def step_flops(row: Row) -> int:
    """Floating-point operations of convolutions in one forward and backward pass: three times the forward pass's.

    PyTorch counts a forward pass rightly, a grouped convolution's backward pass not.
    """
    assert isinstance(row.model, Network) and row.batch is not None
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain_features(row.model, row.batch.inputs, row.choice)
    return 3 * counter.get_total_flops()


def convolution_rate(threads: int, device: torch.device, small: bool) -> float:
    """GFLOP/s of this machine: forward pass of a dense 3x3 convolution, channels last, the best of several."""
    now = clock(threads, device)
    c, pixels, batch = (8, 8, 2) if small else (128, 32, 16)
    x = torch.randn(batch, c, pixels, pixels, generator=generator(0)).to(device, memory_format=torch.channels_last)
    weight = torch.randn(c, c, 3, 3, generator=generator(1)).to(device, memory_format=torch.channels_last)
    best = 0.0
    for _ in range(8):
        began = now()
        for _ in range(4):
            F.conv2d(x, weight, padding=1)
        taken = now() - began
        best = max(best, 4 * 2.0 * x.numel() * 9 * c / taken / 1e9) if taken > 0 else best
    return best


# --------------------------------------------------------------------------------------------------------- the bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", help="only these, separated by commas")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores up to four)")
    parser.add_argument("--rounds", type=int, default=5, help="clean rounds of each row (default: 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    # toy sizes, for tests of the bench itself
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    names = chosen_rows(options.rows, ROWS)
    rounds = positive("--rounds", options.rounds)
    device = settle_device(options.device)
    threads = settle_threads(options.threads)
    sizes = Sizes.small() if options.small else Sizes()
    rate = convolution_rate(threads, device, options.small)
    rows = []
    for name in names:
        say(f"{name} ...")
        row = ROWS[name](sizes, device)
        flops = step_flops(row)
        found = measure(name, row, rounds, threads, device, 0.01 if options.small else SIDE_SECONDS)
        per_image = flops / sizes.batch
        rows.append(
            {
                **{key: value for key, value in found.items() if not key.endswith("peak_memory_bytes")},
                "flops_per_image": per_image,
                "rate_fraction": found["ours_per_second"] * per_image / 1e9 / rate if rate else None,
            }
        )
    return {
        "rows": rows,
        "convolution_gflops": rate,
        "batch_size": sizes.batch,
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor(),
        "torch": torch.__version__,
        "small": options.small,
    }


def text(document: dict[str, Any]) -> str:
    header = ("row", "ours images/s", "plain images/s", "ratio", "least", "most", "rounds", "MFLOP/image", "of rate")
    rows = [
        (
            row["row"],
            f"{row['ours_per_second']:,.1f}",
            f"{row['plain_per_second']:,.1f}",
            *(f"{row[key]:.2f}" for key in ("ratio_median", "ratio_min", "ratio_max")),
            f"{row['rounds']}{'*' if row['disturbed'] else ''}",
            f"{row['flops_per_image'] / 1e6:,.0f}",
            "-" if row["rate_fraction"] is None else f"{row['rate_fraction']:.0%}",
        )
        for row in document["rows"]
    ]
    lines = [
        columns(header, rows),
        "",
        f"forward and backward pass, batches of {document['batch_size']}; "
        f"dense 3x3 convolutions: {document['convolution_gflops']:,.0f} GFLOP/s",
        f"{document['threads']} threads, {document['processor']}, torch {document['torch']}",
    ]
    if any(row["disturbed"] for row in document["rows"]):
        lines.append("* the machine was busy in most rounds")
    return "\n".join(lines)


def pictures(document: dict[str, Any], folder: Path) -> list[Path]:
    """`conv.png`: images per second, ours and plain."""
    rows = document["rows"]
    bars = (("ours", "ours_per_second", MODEL_COLOURS["searched"], -0.17), ("plain", "plain_per_second", FAINT, 0.17))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 1.2 + 0.5 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for label, key, colour, shift in bars:
            places = [i + shift for i in range(len(rows))]
            axes.barh(places, [row[key] for row in rows], height=0.32, color=colour, label=label)
        axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("images per second, forward and backward pass")
        axes.legend(loc="lower right")
        path = folder / "conv.png"
        figure.savefig(path, dpi=150)
    return [path]

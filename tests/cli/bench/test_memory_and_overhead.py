"""`lmnas bench memory` and `lmnas bench overhead`; how near forecasts come to measured peaks."""

import json
import time

import pytest
import torch

from lmnas.cli.bench import BENCHES, memory, open_bench, overhead, peak
from lmnas.cli.bench.rows import ROWS, Sizes
from lmnas.cli.main import bench_parser, main
from lmnas.nn.kernels import fused


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_keeps_the_contract(name):
    bench = open_bench(name)
    assert bench.HELP and all(callable(getattr(bench, part)) for part in ("add_arguments", "run", "text", "pictures"))


def needs(kernel):
    if kernel == "fused":
        try:
            fused.load()
        except fused.Unavailable as problem:
            pytest.skip(f"no fused kernel: {problem}")


@pytest.mark.slow
@pytest.mark.parametrize("name, kernel", [("retrain", "reference"), ("retrain", "fused"), ("search-weight", "fused")])
def test_forecasts_are_near_measured_peaks(name, kernel):
    """At the published sizes; at small ones the libraries' own memory is all there is. `lmnas bench memory` has all."""
    needs(kernel)
    measured = peak.measure(name, "ours", 1, kernel, False, False)
    forecast = memory.forecast_bytes(ROWS[name](Sizes(), torch.device("cpu"), False), kernel)
    assert 0.8 <= forecast / measured <= 1.5


def test_ratios_of_memory(monkeypatch):
    """Ours 300 bytes, plain 400, forecast 330."""
    monkeypatch.setattr(peak, "measure", lambda row, side, *arguments: {"ours": 300, "plain": 400}[side])
    monkeypatch.setattr(memory, "forecast_bytes", lambda *arguments: 330)
    arguments = ["--small", "--threads", "1", "--kernel", "reference", "--rows", "retrain"]
    (row,) = memory.run(bench_parser("memory").parse_args(arguments), lambda line: None)["rows"]
    assert (row["peak_memory_bytes"], row["plain_peak_memory_bytes"], row["forecast_bytes"]) == (300, 400, 330)
    assert (row["share_of_plain"], row["forecast_ratio"]) == (0.75, 1.1)


def test_memory(tmp_path, capsys):
    arguments = ["memory", "--small", "--threads", "1", "--kernel", "reference", "--rows", "retrain"]
    assert main(["bench", *arguments, "--json", "--out", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert 2**20 < row["peak_memory_bytes"] < 2**29 and row["forecast_bytes"] > 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "forecast/ours" in memory.text(document)


def test_network_counts_the_outermost_call_once():
    """20 ms inside, 20 ms outside; the inner call belongs to the outer one."""
    network = overhead.Network()
    inner = network.timed(lambda: time.sleep(0.01))

    def outer():
        time.sleep(0.01)
        inner()

    began = time.perf_counter()
    network.timed(outer)()
    total = time.perf_counter() - began
    time.sleep(0.02)
    assert 0.02 <= network.seconds <= total


def test_watching_leaves_no_trace():
    model = torch.nn.Linear(2, 2)
    backward, grad, network = torch.autograd.backward, torch.autograd.grad, overhead.Network()
    with network.watching(model):
        model(torch.ones(1, 2)).sum().backward()
    inside = network.seconds
    assert inside > 0 and model.weight.grad is not None
    model(torch.ones(1, 2)).sum().backward()
    assert network.seconds == inside and (torch.autograd.backward, torch.autograd.grad) == (backward, grad)
    assert "forward" not in vars(model)


def test_overhead(tmp_path, capsys):
    arguments = ["overhead", "--small", "--threads", "1", "--kernel", "reference", "--rows", "search-first-order"]
    assert main(["bench", *arguments, "--json", "--out", str(tmp_path)]) == 0
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert row["steps"] == 32  # 2 epochs of 16: 2,640 tokens of train in 16 streams of 165, segments of 10
    assert row["step_microseconds"] == pytest.approx(row["network_microseconds"] + row["overhead_microseconds"])
    assert 0 < row["overhead_share"] < 1 and row["network_microseconds"] > 0
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    assert "outside" in overhead.text(document)

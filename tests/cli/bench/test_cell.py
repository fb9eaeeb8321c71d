"""`lmnas bench cell`: both sides do the same work, wrong or disturbed measurements are not reported as good ones."""

import json

import pytest
import torch

from lmnas.cli.bench import cell, machine, peak
from lmnas.cli.bench.options import chosen_rows
from lmnas.cli.bench.rows import ROWS, Row, Setting, Sizes, search_step_flops
from lmnas.cli.main import bench_parser, main
from lmnas.core.contracts import Batch
from lmnas.core.errors import UserError
from lmnas.nn.cost import forward_flops, on_meta
from lmnas.nn.kernels import using
from lmnas.spaces.recurrent.cell import RecurrentCell
from lmnas.tasks.language_modeling import LanguageModel, ModelSettings

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored():
    """The choice of kernel as it was, after the test."""
    with using(kernel="reference"):
        yield


# ------------------------------------------------------------------------------------------------------- the sides


@pytest.mark.parametrize("per_edge", [False, True])
@pytest.mark.parametrize("name", [name for name in ROWS if name != "lstm"])
def test_both_sides_do_the_same(name, per_edge):
    """Loss and, where there is training, the gradient's norm."""
    row = ROWS[name](Sizes.small(), CPU, per_edge)
    for _ in range(2):  # a step changes nothing: its rate is zero
        assert row.ours() == pytest.approx(row.plain(), rel=1e-4)


def test_the_published_search_step_takes_529_gflop():
    """8,960 tokens x 3 x 2 x (600 x 600 + 36 x 300 x 600 + 300 x 10,000); PyTorch counts the same."""
    assert search_step_flops(Sizes()) == 3 * 2 * 8960 * (360_000 + 6_480_000 + 3_000_000) == 528_998_400_000
    sizes = Sizes.small()
    space = RecurrentCell()
    model = on_meta(lambda: LanguageModel(space.supernet(32), 200, ModelSettings(width=32)))
    tokens = torch.zeros(sizes.bptt, sizes.search_batch, dtype=torch.long)
    mixture = {"nodes": torch.zeros(36, 5, device="meta")}
    # the reference's mean over nine nodes is one more product for PyTorch
    mean = 2 * 9 * 32 * tokens.numel()
    assert search_step_flops(sizes) == 3 * (forward_flops(model, Batch(tokens, tokens, tokens.numel()), mixture) - mean)


def test_lstm_row_trains_an_lstm_of_the_same_sizes(monkeypatch):
    bodies = []
    init = Setting.__init__

    def keep(self, body, width, batch_size, *args, **settings):
        bodies.append((type(body).__name__, width, batch_size, settings))
        init(self, body, width, batch_size, *args, **settings)

    monkeypatch.setattr(Setting, "__init__", keep)
    ROWS["lstm"](Sizes.small(), CPU, False)
    (ours, *same), (plain, *also) = bodies
    assert (ours, plain) == ("Cell", "LSTMBody") and same == also


# --------------------------------------------------------------------------------------------------------- measuring


class Quiet:
    """A `Watch` that reports foreign use as told, the last value for ever."""

    def __init__(self, *cores):
        self.cores = list(cores)

    def __call__(self):
        return self

    def foreign_cores(self):
        return self.cores.pop(0) if len(self.cores) > 1 else self.cores[0]


class Clock:
    """Seconds that only work makes pass."""

    def __init__(self):
        self.now = 0.0

    def work(self, seconds, *values):
        def go():
            self.now += next(seconds)
            return values

        return go


def measured(monkeypatch, watch, ours=(1.0,), plain=(3.0,), rounds=3, values=((2.0, 5.0), (2.0, 5.0))):
    def forever(seconds):
        while True:
            yield from seconds

    clock = Clock()
    monkeypatch.setattr(cell, "clock", lambda threads, device: lambda: clock.now)
    monkeypatch.setattr(cell, "Watch", watch)
    row = Row(clock.work(forever(ours), *values[0]), clock.work(forever(plain), *values[1]), tokens=100)
    return cell.measure("toy", row, rounds, 1, CPU, seconds=0.001)


def test_medians_and_extremes_over_rounds(monkeypatch):
    """Warm-up takes two of each; then plain takes 2, 6 and 4 seconds, ours 2."""
    found = measured(monkeypatch, Quiet(0.0), ours=[2.0], plain=[9.0, 9.0, 2.0, 6.0, 4.0])
    assert (found["ours_per_second"], found["plain_per_second"]) == (50.0, 25.0)
    assert (found["ratio_median"], found["ratio_min"], found["ratio_max"]) == (2.0, 1.0, 3.0)
    assert (found["rounds"], found["rounds_dropped"], found["disturbed"]) == (3, 0, False)


def test_short_work_is_repeated_within_a_round(monkeypatch):
    """The system's clock of foreign use is coarse."""
    calls = []

    def work():
        calls.append(1)
        return (1.0,)

    monkeypatch.setattr(cell, "Watch", Quiet(0.0))
    found = cell.measure("toy", Row(work, work, tokens=1), 2, 1, CPU, seconds=0.001)
    assert len(calls) > 2 * (2 + 2) and found["rounds"] == 2


def test_disturbed_rounds_are_dropped_and_taken_again(monkeypatch):
    found = measured(monkeypatch, Quiet(0.0, 1.5, 0.16, 0.15, 0.0))
    assert (found["rounds"], found["rounds_dropped"], found["disturbed"]) == (3, 2, False)


def test_a_busy_machine_is_admitted(monkeypatch):
    """Three times the rounds asked for, no more; then what there is, marked."""
    found = measured(monkeypatch, Quiet(0.0, 2.0))
    assert (found["rounds"], found["rounds_dropped"], found["disturbed"]) == (9, 8, True)


@pytest.mark.parametrize(
    "values, message",
    [
        (((2.001, 5.0), (2.0, 5.0)), "row toy: the loss is 2.001 with our kernel and 2 with the plain formulation"),
        (((2.0, 5.2), (2.0, 5.0)), "the gradient norm is 5.2"),
        (((2.0, 5.0, 2.0, 5.0), (2.0, 5.0, 2.1, 5.0)), "the loss is 2 with our kernel and 2.1"),
        (((float("nan"),), (float("nan"),)), "not finite"),
    ],
)
def test_a_fast_wrong_kernel_is_not_reported(monkeypatch, values, message):
    with pytest.raises(UserError, match=message):
        measured(monkeypatch, Quiet(0.0), values=values)


def test_a_wrong_kernel_stops_the_command(monkeypatch, capsys):
    """The loss of our side is a little off: exit code 2, no numbers."""
    right = cell.ROWS["cross-entropy"]

    def wrong(*arguments):
        row = right(*arguments)
        return Row(lambda: (1.001 * row.ours()[0],), row.plain, row.tokens)

    monkeypatch.setitem(cell.ROWS, "cross-entropy", wrong)
    arguments = ["bench", "cell", "--small", "--no-memory", "--kernel", "reference", "--threads", "1"]
    assert main([*arguments, "--rows", "cross-entropy", "--json"]) == 2
    out, err = capsys.readouterr()
    assert not out and "so nothing is reported" in err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------- machine


def test_own_work_is_not_foreign(monkeypatch):
    """Ten seconds passed; all CPUs worked 7 seconds, this process 4 of them: 0.3 cores are others'."""
    times = {"busy": [100.0, 107.0], "own": [1.0, 5.0], "wall": [0.0, 10.0]}
    monkeypatch.setattr(machine, "busy_seconds", lambda: times["busy"].pop(0))
    monkeypatch.setattr(machine.time, "process_time", lambda: times["own"].pop(0))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: times["wall"].pop(0))
    assert machine.Watch().foreign_cores() == pytest.approx(0.3)


def test_busy_seconds_adds_steal_and_leaves_idle_out(monkeypatch, tmp_path):
    """user 1 + nice 2 + system 4 + irq 32 + softirq 64 + steal 128 = 231 ticks, without idle, iowait, guests."""
    (tmp_path / "stat").write_text("cpu 1 2 4 8 16 32 64 128 256 512\ncpu0 9 9 9\n")
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / "stat")
    assert machine.busy_seconds() == pytest.approx(231 / machine.os.sysconf("SC_CLK_TCK"))


def test_product_rates_are_of_exact_products(monkeypatch):
    rates = machine.product_rates(1, CPU, seconds=0.01)
    assert rates["default"].keys() == {"2048x600x300", "1024x1024x1024"}
    assert all(1 < rate < 1e5 for rate in rates["default"].values())
    monkeypatch.setattr(machine, "EXACT", 0.0)  # as where a route rounds to bfloat16
    assert set(machine.product_rates(1, CPU, seconds=0.01)["default"].values()) == {None}


def test_peak_of_a_fresh_process():
    """The plain side of the decoder's loss holds 8,960 x 10,000 logits, their logarithms and their gradient at once;
    ours holds none of the three whole."""
    logits = 8960 * 10_000 * 4
    plain, ours = (peak.measure("cross-entropy", side, 2, "reference", False, False) for side in ("plain", "ours"))
    assert 3 * logits <= plain < 4 * logits and ours < logits / 2


# ------------------------------------------------------------------------------------------------- the command line


def test_answer_and_pictures(tmp_path, capsys):
    arguments = ["bench", "cell", "--small", "--rounds", "2", "--threads", "1", "--kernel", "reference", "--no-memory"]
    assert main([*arguments, "--rows", "retrain,search-weight", "--json", "--out", str(tmp_path / "pictures")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in document["rows"]] == ["retrain", "search-weight"]
    for row in document["rows"]:
        assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
        assert row["ours_per_second"] > 0 and row["plain_per_second"] > 0 and row["rounds"] >= 2
        assert row["peak_memory_bytes"] is None and row["plain_peak_memory_bytes"] is None
    assert document["kernel"] == "reference" and document["threads"] == 1
    assert document.keys() >= {"processor", "torch"}
    assert (tmp_path / "pictures" / "cell.png").read_bytes().startswith(b"\x89PNG")
    assert document["pictures"] == [str(tmp_path / "pictures" / "cell.png")]


def test_fraction_of_the_fastest_product(monkeypatch):
    """4 steps a second of 64 tokens, each 3 x 2 x (64 x 64 + 36 x 32 x 64 + 32 x 200) operations, of 1 GFLOP/s."""
    monkeypatch.setattr(cell, "product_rates", lambda *arguments: {"default": {"a": 0.5, "b": None, "c": 1.0}})
    monkeypatch.setattr(cell, "measure", lambda name, *arguments: {"row": name, "ours_per_second": 256.0})
    options = bench_parser("cell").parse_args(["--small", "--threads", "1", "--kernel", "reference", "--no-memory"])
    document = cell.run(options, lambda line: None)
    assert document["gemm_gflops"] == 1.0
    assert document["gemm_fraction"] == pytest.approx(256 * 6 * (4096 + 73_728 + 6400) / 1e9)


def test_text_and_no_fraction_without_the_search_row(capsys):
    arguments = ["bench", "cell", "--small", "--rounds", "1", "--threads", "1", "--kernel", "reference", "--no-memory"]
    assert main([*arguments, "--rows", "evaluate-10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "row" and lines[1].split()[0] == "evaluate-10"
    assert any(line.startswith("products: ") and "search step" not in line for line in lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["cel"], "bench 'cel' is unknown. Did you mean 'cell'?"),
        (["cell", "--rows", "retrian"], "--rows: row 'retrian' is unknown. Did you mean 'retrain'?"),
        (["cell", "--rows", ","], "--rows: expected names separated by commas"),
        (["cell", "--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["cell", "--threads", "-1"], "--threads: expected at least 1, got -1"),
        (["cell", "--kernel", "fusd"], "kernel 'fusd' is unknown. Did you mean 'fused'?"),
        (["cell", "--device", "tpu9"], "--device 'tpu9': not usable here"),
        (["cell", "--rown", "2"], "unrecognized arguments: --rown"),
        (["memory", "--rows", "evaluate-1"], "--rows: row 'evaluate-1' is unknown"),
        ([], "required: name"),
    ],
)
def test_refusals(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and err.count("\n") == 1


def test_rows_are_taken_once_in_the_order_given():
    assert chosen_rows("b, a,b", ["a", "b", "c"]) == ["b", "a"]
    assert chosen_rows(None, ["a", "b"]) == ["a", "b"]


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    assert main(["bench", "cell", "--small", "--rounds", "1", "--device", "cuda", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kernel"] == "reference" and document["device"] != "cpu"
    assert all(row["peak_memory_bytes"] > 0 for row in document["rows"])

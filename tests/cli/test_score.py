"""`lmnas score` and `lmnas bench nas-bench-nlp`: tables of scores, and their correlation with losses."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command_line import answer, call
from killing import until
from scipy import stats

from lmnas.cli.bench import nas_bench_nlp
from lmnas.cli.score import batch_of_text, sampled
from lmnas.core.genotype import load_genotype
from lmnas.methods.proxies import transformer
from lmnas.nn.kernels.library import exact_onednn_products
from lmnas.runs.build import covering_space

TABLE = Path(os.environ.get("LMNAS_DATA", "data")) / "nas-bench-nlp"


@pytest.fixture(scope="module")
def text(tmp_path_factory, cache):
    path = tmp_path_factory.mktemp("score") / "text.txt"
    path.write_text(tiny.text(6000))
    return path


def entries(n):
    """A table in the shared format without metrics; the losses are made up."""
    for k, (_, genotype) in enumerate(sampled("recurrent-graph", n, 0)):
        runs = [{"id": k, "started": "", "test_loss": None if k == 1 else 4.0 + (7 * k % 11) / 10, "scored": True}]
        mean = runs[0]["test_loss"]
        yield {
            "id": k,
            "group": f"g{k // 2}",
            "recipe": dict(genotype.choices),
            "ptb": {"params": 1, "runs": runs, "test_loss_mean": mean},
        }


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def test_one_architecture_by_name(text):
    found = answer("score", "nas-bench-nlp-gru", "--data", text, "--width", 8, "--metrics", "all")
    (row,) = found["scores"]
    assert row["genotype_id"] == load_genotype("nas-bench-nlp-gru").id
    assert set(row["undefined"]) == {"hidden_covariance_2", "hidden_covariance_3"}
    assert row["metrics"]["hidden_covariance_1"] < 0 and row["metrics"]["hidden_covariance_2"] is None
    assert found["split"] == "valid"
    _, out, _ = call("score", "nas-bench-nlp-gru", "--data", text, "--width", 8, "--metrics", "hidden_covariance_2")
    assert out.splitlines()[-1] == "hidden_covariance_2: undefined where the body has 1 layers"


def test_many_architectures_as_csv_and_json_agree(text, tmp_path):
    arguments = ["score", "--sample", 3, "--space", "recurrent-cell", "--data", text, "--width", 6, "--seed", 4]
    code, out, err = call(*arguments, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(rows) == 3 and "[3/3]" in err
    for row, expected in zip(rows, answer(*arguments)["scores"], strict=True):
        assert row["genotype_id"] == expected["genotype_id"]
        assert float(row["jacobian_cosine"]) == expected["metrics"]["jacobian_cosine"]
    lines = [load_genotype(name).to_dict() for name in ("darts-v2", "lstm-1")]
    lines[0]["name"] = "first"
    lines.append(next(entries(1)))
    given = answer("score", write(tmp_path / "many.jsonl", lines), "--data", text, "--width", 6)
    assert [row["name"] for row in given["scores"]] == ["first", load_genotype("lstm-1").id, "0"]


def test_transformers_have_metrics_of_their_own(text):
    """The table's values are those of the functions; metrics of other bodies, and a mixture of both, are refused."""
    arguments = ["score", "--sample", 2, "--space", "flexibert", "--data", text, "--width", 8, "--seed", 3]
    found = answer(*arguments, "--metrics", "all")
    tokens, vocabulary = batch_of_text(str(text), "valid")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for (_, genotype), row in zip(sampled("flexibert", 2, 3), found["scores"], strict=True):
        network = transformer.untrained(covering_space(genotype).build(genotype, 8), vocabulary, 3)
        with exact_onednn_products():  # some of these metrics are rounding error
            expected = transformer.measure(network, tokens.t(), transformer.METRICS, 3)
        assert row["metrics"] == {k: None if isinstance(v, str) else v for k, v in expected.items()}
        assert row["metrics"]["parameters"] == sum(p.numel() for p in network.parameters())
    torch.set_num_threads(threads)
    assert list(answer(*arguments)["scores"][0]["metrics"]) == ["head_confidence", "w_pca", "parameters"]
    code, _, err = call(*arguments, "--metrics", "hidden_covariance_1")
    assert code == 2 and "takes causal stateful sequence bodies; space 'flexibert' makes bidirectional" in err


def test_tables_of_different_metrics_are_not_mixed(text, tmp_path):
    lines = [sampled(space, 1, 0)[0][1].to_dict() for space in ("flexibert", "recurrent-cell")]
    code, _, err = call("score", write(tmp_path / "two.jsonl", lines), "--data", text)
    assert code == 2 and "got spaces 'flexibert' and 'recurrent-cell'" in err


def test_workers_change_nothing(text):
    arguments = ["score", "--sample", 2, "--space", "recurrent-graph", "--data", text, "--width", 6]
    assert answer(*arguments, "--workers", 2)["scores"] == answer(*arguments)["scores"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["score"], "--sample N --space NAME"),
        (["score", "darts-v2", "--metrics", "hidden_covarianc_1"], "Did you mean 'hidden_covariance_1'?"),
        (["score", "--sample", "2"], "needs --space"),
        (["score", "--sample", "2", "--space", "recurent-graph"], "Did you mean 'recurrent-graph'?"),
        (["score", "darts-v3"], "Did you mean 'darts-v"),
        (["score", "nothing.jsonl"], "nothing.jsonl: cannot be read"),
        (["score", "darts-v2", "--width", "0"], "--width: expected at least 1, got 0"),
        (["score", "darts-v2", "--csv", "--json"], "give one of them"),
        (["bench", "nas-bench-npl"], "Did you mean 'nas-bench-nlp'?"),
        (["bench"], "required: name"),
        (["bench", "nas-bench-nlp"], "--data"),
        (["bench", "nas-bench-nlp", "--data", "nowhere"], "nowhere: cannot be read"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    code, out, err = call(*arguments)
    assert code == 2 and not out and err.count("\n") == 1 and message in err


@pytest.fixture(scope="module")
def small(text):
    """The benchmark with layers of width 6."""
    patch = pytest.MonkeyPatch()
    patch.setattr(nas_bench_nlp, "WIDTH", 6)
    patch.setattr(nas_bench_nlp, "INNER", (8, 8))
    patch.setattr(nas_bench_nlp, "N_RESAMPLES", 50)
    yield ["bench", "nas-bench-nlp", "--corpus", text, "--workers", 1]
    patch.undo()


def test_bench_correlates_scores_with_losses(small, text, tmp_path):
    table = write(tmp_path / "table.jsonl", entries(10))
    metrics = ["hidden_covariance_1", "hidden_saliency", "parameters", "predictor"]
    arguments = [*small, "--data", table, "--metrics", ",".join(metrics)]
    cached = [*arguments, "--cache", tmp_path / "cache.jsonl"]
    found = answer(*cached, "--out", tmp_path / "pictures")
    assert list(found["metrics"]) == metrics and found["n_architectures"] == 9
    for name, row in found["metrics"].items():
        scores, losses = zip(*found["points"][name], strict=True)
        assert row["kendall_tau"] == pytest.approx(stats.kendalltau(scores, [-v for v in losses]).statistic)
        assert row["low"] <= row["kendall_tau"] <= row["high"] and row["n"] == len(scores)
    assert found["metrics"]["predictor"]["n"] == 9
    assert all(found["speed"][way] > 0 for way in ("ours", "one_worker", "plain"))
    drawn = {Path(path).name for path in found["pictures"]}
    assert drawn == {f"nas-bench-nlp-{name}.png" for name in [*metrics, "regret"]}
    # what was measured is read again, torn line or not; and without the file all is the same
    with open(tmp_path / "cache.jsonl", "a") as file:
        file.write('{"seed": 0, "gen')
    again = answer(*cached)
    assert again["architectures_per_second"] is None
    assert again["metrics"] == found["metrics"] == answer(*arguments)["metrics"]
    # the metric's sign is turned: saliency goes with a worse model
    code, out, _ = call(*arguments)
    assert code == 0 and "hidden_saliency" in out and "0.268" in out


def test_bench_draws_the_same_architectures_with_the_same_seed(small, tmp_path):
    table = write(tmp_path / "table.jsonl", entries(10))
    arguments = [*small, "--data", table, "--metrics", "parameters", "--limit", 4]
    first, second, other = (answer(*arguments, "--seed", seed)["points"] for seed in (0, 0, 1))
    assert len(first["parameters"]) == 4 and first == second != other


def test_regret_of_a_score_that_knows_is_zero():
    """Forty losses; one score is their negative, another the loss itself, a third exists for the best two alone."""
    table = [{"loss": 4.0 + k / 100, "group": str(k)} for k in range(40)]
    values = [
        {"hidden_covariance_1": -k, "jacobian_cosine": k, "parameters": 1.0 * k if k < 2 else "none"} for k in range(40)
    ]
    names = ["hidden_covariance_1", "jacobian_cosine", "parameters"]
    found = nas_bench_nlp.regret(table, values, names, 0)
    assert found["evaluations"] == [1, 2, 5, 10, 20] and found["pool_size"] == 40
    assert found["orders"]["hidden_covariance_1"]["mean"] == [0.0] * 5
    assert found["orders"]["jacobian_cosine"]["mean"] == pytest.approx([0.39, 0.38, 0.35, 0.3, 0.2])
    assert found["orders"]["parameters"]["mean"] == pytest.approx([0.01, 0, 0, 0, 0])
    random_mean = found["orders"]["random"]["mean"]
    # the least of k of 40 uniform ranks is 41 / (k + 1) - 1 on average
    assert random_mean == pytest.approx([0.01 * (41 / (k + 1) - 1) for k in (1, 2, 5, 10, 20)], rel=0.6)


def test_bench_names_the_line_that_is_wrong(small, tmp_path):
    lines = list(entries(3))
    lines[2]["recipe"]["h_new_0"]["op"] = "linea"
    code, _, err = call(*small, "--data", write(tmp_path / "table.jsonl", lines))
    assert code == 2 and "line 3" in err and "Did you mean 'linear'?" in err
    del lines[1]["group"]
    code, _, err = call(*small, "--data", write(tmp_path / "table.jsonl", lines))
    assert code == 2 and "line 2: expected an entry" in err


@pytest.mark.skipif(not TABLE.is_dir(), reason="the NAS-Bench-NLP table is not in LMNAS_DATA")
def test_bench_reads_the_published_table():
    read = nas_bench_nlp.read_table(str(TABLE))
    assert len(read) == 1685
    assert sum(len(entry["runs"]) for entry in read) == 4419  # of trainings in the published table of metrics
    seen = nas_bench_nlp.fitted_groups()
    assert sum(entry["group"] in seen for entry in read) >= 100


def test_a_missing_text_is_one_line_with_workers(tmp_path):
    code, out, err = call(
        "score", "--sample", "2", "--space", "recurrent-graph", "--data", tmp_path / "none", "--workers", "2"
    )
    assert code == 2 and not out and "none" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
def test_workers_leave_with_a_killed_parent(text):
    command = [sys.executable, "-m", "lmnas", "score", "--sample", "2000", "--space", "recurrent-graph"]
    command += ["--data", str(text), "--width", "6", "--workers", "2"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert parent.stderr is not None
    assert "[1/2000]" in parent.stderr.readline()
    workers = [pid for pid in children(parent.pid)]
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    parent.stderr.close()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="processes are looked up in /proc")
def test_a_lost_worker_and_a_stop_lose_no_scores(text):
    command = [sys.executable, "-m", "lmnas", "score", "--sample", "2000", "--space", "recurrent-graph", "--json"]
    command += ["--data", str(text), "--width", "6", "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stderr is not None and "[1/2000]" in parent.stderr.readline()
        os.kill(children(parent.pid)[0], signal.SIGKILL)
        until(lambda: "a worker died" in parent.stderr.readline())
        os.kill(parent.pid, signal.SIGINT)
        out, _ = parent.communicate()
    document = json.loads(out)
    assert parent.returncode == 130 and document["interrupted"]
    expected = [genotype.to_dict() for _, genotype in sampled("recurrent-graph", len(document["scores"]), 0)]
    assert expected and [row["genotype"] for row in document["scores"]] == expected


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]

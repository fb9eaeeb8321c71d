"""The benchmark on a small file of its own, and the published counts and correlations on the real one."""

import argparse
import functools
import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import tiny
import torch

from lmnas.cli.bench import BENCHES, nas_bench_bert
from lmnas.cli.bench.nas_bench_bert import NAMES, PUBLISHED, TABULAR, batch, pictures, read, run, text
from lmnas.cli.main import main
from lmnas.core.errors import UserError
from lmnas.methods.proxies.statistics import rank_correlations
from lmnas.methods.proxies.transformer import METRICS
from lmnas.spaces.transformer.flexibert import OPERATIONS, metric_body, trained_body


def record(number, draws):
    hidden = draws.choice((128, 256))
    layers = []
    for _ in range(draws.choice((2, 4))):
        kind, _, parameter = draws.choice(OPERATIONS).partition("-")
        layers.append(
            {
                "operation_type": kind,
                "operation_parameter": int(parameter) if parameter.isdigit() else parameter,
                "num_operation_heads": draws.choice((2, 4)),
                "feed_forward_dimension": draws.choice((512, 1024)),
                "num_feed_forward": draws.choice((1, 3)),
            }
        )
    glue = 60 + 2 * len(layers) + hidden / 64 + draws.random()
    columns = {"head_confidence": draws.random(), "number_of_parameters": draws.randrange(10**7)}
    return {
        "id": number,
        "group": f"g{number}",
        "hidden_size": hidden,
        "encoder_layers": layers,
        "scores": {"glue": glue},
        "published_metrics": columns,
    }


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """The bootstrap is tested with the statistics; here it only takes time."""
    monkeypatch.setattr(nas_bench_bert, "rank_correlations", functools.partial(rank_correlations, n_resamples=10))


@pytest.fixture
def place(tmp_path, monkeypatch, cache):
    """A folder with 14 models, the last two of one configuration, and a text; networks are 8 wide."""
    draws = random.Random(0)
    records = [record(number, draws) for number in range(13)]
    records.append({**records[-1], "id": 13, "scores": {"glue": 66.0}})
    (tmp_path / "architectures.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "text.txt").write_text(tiny.text(60))
    monkeypatch.setattr(nas_bench_bert, "VOCABULARY", 30)
    monkeypatch.setattr(nas_bench_bert, "_body", lambda genotype, which: metric_body(genotype, 128, 8, 12))
    return tmp_path


def options(place, *words):
    parser = argparse.ArgumentParser()
    nas_bench_bert.add_arguments(parser)
    small = ["--corpus", str(place / "text.txt"), "--sequences", "2", "--length", "8"]
    return parser.parse_args(["--data", str(place), *small, *words])


def test_it_is_registered():
    assert BENCHES["nas-bench-bert"] == nas_bench_bert.__name__ and nas_bench_bert.HELP


def test_a_run(place):
    said = []
    document = run(options(place), said.append)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert set(document["metrics"]) | set(document["undefined"]) == set(NAMES)
    assert document["n"] == 14 and document["n_networks"] <= 13 and said[-1].startswith("14 of 14 models")
    for found in document["metrics"].values():
        assert found.keys() == {"kendall_tau", "spearman_rho", "low", "high", "n"}
        assert -1 <= found["low"] <= found["high"] <= 1 and found["n"] == 14
    assert document["metrics"]["depth_width"]["kendall_tau"] > 0.7  # as the file was made
    assert set(document["strata"]) <= {"2 x 128", "2 x 256", "4 x 128", "4 x 256"}
    assert sum(stratum["parameters"]["n"] for stratum in document["strata"].values() if "parameters" in stratum) <= 14
    assert set(document["published"]) == {"head_confidence", "parameters"}
    first, twin = document["models"][12:]
    assert first["id"] == 12 and twin["glue"] == 66.0
    assert {name: first[name] for name in NAMES} == {name: twin[name] for name in NAMES}
    again = run(options(place), said.append)
    assert {**again, "seconds": 0} == {**document, "seconds": 0}
    other = run(options(place, "--seed", "1", "--metrics", "head_confidence"), said.append)
    assert other["models"][0]["head_confidence"] != document["models"][0]["head_confidence"]


def test_more_is_better_is_positive(place):
    """τ by counting pairs of models, ties on either side taken out of it (τ_b)."""
    document = run(options(place, "--metrics", "parameters_as_configured,feed_forward_layers"), print)
    for name in ("parameters_as_configured", "feed_forward_layers"):
        pairs = list(itertools.combinations([(m[name], m["glue"]) for m in document["models"]], 2))
        signs = [((a > b) - (a < b), (x > y) - (x < y)) for (a, x), (b, y) in pairs]
        agreement = sum(s * t for s, t in signs)
        tau = agreement / (sum(s * s for s, _ in signs) * sum(t * t for _, t in signs)) ** 0.5
        assert document["metrics"][name]["kendall_tau"] == pytest.approx(tau)


def test_pooled_inside_the_strata():
    """Weights 1 : 3; variances add: the half-widths 0.2 and 0.4 / 3 count (0.2 · 1/4) and (0.4/3 · 3/4)."""
    strata = {
        "2 x 128": {"m": {"kendall_tau": 0.5, "low": 0.3, "high": 0.7, "n": 20}},
        "4 x 128": {"m": {"kendall_tau": 0.1, "low": 0.1 - 0.4 / 3, "high": 0.1 + 0.4 / 3, "n": 60}},
        "4 x 256": {},
    }
    half = math.sqrt(0.05**2 + 0.1**2)
    expected = {"kendall_tau": 0.2, "low": 0.2 - half, "high": 0.2 + half, "n": 80}
    assert nas_bench_bert._pooled(strata, "m") == pytest.approx(expected)
    assert nas_bench_bert._pooled(strata, "other") == {}


def test_from_the_command_line(place, capsys):
    words = ["bench", "nas-bench-bert", "--data", str(place), "--corpus", str(place / "text.txt"), "--length", "8"]
    assert main([*words, "--metrics", "parameters,depth_width", "--out", str(place / "p"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["metrics"]) == {"parameters", "depth_width"} and len(document["pictures"]) == 2
    assert main([*words, "--metrics", "depth_width"]) == 0
    assert "depth_width" in capsys.readouterr().out
    assert main([*words, "--metrics", "depth"]) == 2
    assert capsys.readouterr().err.startswith("lmnas: --metrics: 'depth' is unknown. Did you mean")


def test_commands_of_the_documents_are_right():
    page = (Path(__file__).parents[3] / "docs" / "training-free-transformers.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    lmnas bench nas-bench-bert(.*)$", page, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        parser = argparse.ArgumentParser(exit_on_error=False)
        nas_bench_bert.add_arguments(parser)
        parser.add_argument("--out")  # the command line's own
        nas_bench_bert._chosen(parser.parse_args(command.split()).metrics)
    named = set(re.findall(r"`([a-z_]+)`", page))
    assert {name for name in NAMES if not name.endswith("_normalized") and not name.startswith("probed_")} <= named


def test_without_network_metrics_no_network_is_built(place, monkeypatch):
    monkeypatch.setattr(nas_bench_bert, "network", None)
    document = run(options(place, "--metrics", "depth_width"), print)
    assert document["n_networks"] == 0 and list(document["metrics"]) == ["depth_width"]


def test_limit_draws_models_by_the_seed(place):
    drawn = [
        [m["id"] for m in run(options(place, "--metrics", "depth_width", "--limit", "5", "--seed", s), print)["models"]]
        for s in ("0", "0", "1")
    ]
    assert len(drawn[0]) == 5 and drawn[0] == drawn[1] != drawn[2] and drawn[0] == sorted(drawn[0])


def test_text_and_pictures(place, tmp_path):
    document = run(options(place, "--metrics", "head_confidence,parameters,depth_width"), print)
    lines = text(document).splitlines()
    assert all(len(line) <= 160 for line in lines)
    (row,) = [line for line in lines if line.startswith("head_confidence ")]
    assert f"{document['metrics']['head_confidence']['kendall_tau']:.3f}" in row and "0.478" in row
    paths = pictures(document, tmp_path / "pictures")
    assert [path.name for path in paths] == [f"nas-bench-bert-{name}.svg" for name in document["metrics"]]
    for path in paths:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_ids_are_ranks_of_words(place):
    ids, described = batch(str(place / "text.txt"), 2, 8)
    words = (place / "text.txt").read_text().split("\n")[:3]
    flat = [word for line in words for word in [*line.split(), "<eos>"]][:16]
    assert ids.shape == (2, 8) and ids.min() >= 1 and ids.max() < 30 and described["name"] == "text.txt"
    assert len(set(zip(flat, ids.flatten().tolist(), strict=True))) == len(set(flat)) == ids.unique().numel()
    assert ids.flatten()[flat.index("<eos>")] == 1  # the most frequent token of six-word lines


@pytest.mark.parametrize(
    "words, message",
    [
        (["--metrics", "head_confidense"], "--metrics: 'head_confidense' is unknown. Did you mean 'head_confidence'?"),
        (["--limit", "2"], "--limit: expected at least 3, got 2"),
        (["--length", "513"], "--length: expected at least 2 and at most 512, got 513"),
        (["--sequences", "0"], "--sequences: expected at least 1, got 0"),
        (["--sequences", "9999"], "9999 sequences of 8 need 79992"),
        (["--data", "nowhere"], "nowhere cannot be read: No such file or directory"),
        (["--corpus", "nowhere"], "data 'nowhere' is neither a known corpus nor an existing text file"),
    ],
)
def test_bad_options_are_refused(place, words, message):
    with pytest.raises(UserError) as refusal:
        run(options(place, *words), print)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["encoder_layers"][0].update(operation_parameter="SPD"), "Did you mean 'SA-SDP'?"),
        (lambda r: r["encoder_layers"][0].pop("num_feed_forward"), "'num_feed_forward' is missing"),
        (lambda r: r["encoder_layers"].pop(), "layers: 1 is not one of 2, 4"),
        (lambda r: r.update(hidden_size=512), "hidden: 512 is not one of 128, 256"),
        (lambda r: r["scores"].update(glue=float("nan")), "scores.glue: expected a finite number, got nan"),
        (lambda r: r.pop("scores"), "'scores' is missing"),
    ],
)
def test_bad_records_are_refused_with_their_line(place, change, message):
    draws = random.Random(3)
    records = [record(number, draws) for number in range(4)]
    records[2]["encoder_layers"] = records[2]["encoder_layers"][:2]
    records[2]["encoder_layers"][0]["operation_type"] = "SA"
    records[2]["encoder_layers"][0]["operation_parameter"] = "SDP"
    change(records[2])
    (place / "bad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(UserError) as refusal:
        read(place / "bad.jsonl")
    assert "bad.jsonl, line 3: " in str(refusal.value) and message in str(refusal.value)


def test_what_is_not_such_a_file_is_refused(place, monkeypatch):
    (place / "broken.jsonl").write_text("{]\n")
    (place / "list.jsonl").write_text("[]\n")
    (place / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    (place / "empty.jsonl").write_text("\n")
    for name, message in (
        ("broken.jsonl", "line 1: not JSON"),
        ("list.jsonl", "line 1: not a model of NAS-Bench-BERT"),
        ("bytes.jsonl", "not UTF-8 text"),
        ("empty.jsonl", "0 models; a rank correlation needs at least 3"),
    ):
        with pytest.raises(UserError, match=message):
            read(place / name)
    monkeypatch.setenv("LMNAS_DATA", str(place))
    with pytest.raises(UserError, match="--data is missing"):
        read(None)


# --------------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def benchmark(shared_data):
    path = shared_data / "nas-bench-bert" / "architectures.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return read(path), [json.loads(line) for line in path.read_text().splitlines()]


def test_every_model_has_the_published_parameters(benchmark):
    """The networks' own count: as scored (published), as configured and as the training code has them (derived)."""
    embedding = 30_522 * 128 + 512 * 128 + 2 * 128 + 2 * 128
    for model, source in zip(*benchmark, strict=True):
        with torch.device("meta"):
            bodies = [
                metric_body(model.genotype),
                trained_body(model.genotype),
                trained_body(model.genotype, 128, True),
            ]
        counts = [embedding + sum(p.numel() for p in body.parameters()) for body in bodies]
        assert counts[0] == source["published_metrics"]["number_of_parameters"]
        assert counts == [source["derived_params"][key] for key in ("metric_model", "as_configured", "first_ff_4h")]
    assert len(benchmark[0]) == 250


def test_published_correlations_return_on_the_half(benchmark):
    """Half of the models: within sampling error of the values recomputed on all 500."""
    models, _ = benchmark
    found = nas_bench_bert._published(models, list(METRICS), 0)
    found |= nas_bench_bert._correlations(
        models, [{name: TABULAR[name](m.genotype) for name in TABULAR} for m in models], list(TABULAR), 0
    )[0]
    assert set(PUBLISHED) <= set(found)
    for name, tau in PUBLISHED.items():
        assert found[name]["kendall_tau"] == pytest.approx(tau, abs=0.07), name
    assert found["parameters"]["n"] == 250


def test_the_released_activation_distance_counts_each_output_many_times(benchmark):
    """The release's one activation module gathers a hook for every layer ever scored: raw = mean · calls · an integer.

    Without that factor the released values rank as well as ours do (docs/training-free-transformers.md).
    """
    models, sources = benchmark
    values, factors = [], []
    for source in sources:
        calls = sum(layer["num_feed_forward"] for layer in source["encoder_layers"])
        mean = source["published_metrics"]["activation_distance_normalized"]
        factors.append(source["published_metrics"]["activation_distance"] / mean / calls)
        values.append({"activation_distance": mean * calls})
    assert factors == pytest.approx([round(factor) for factor in factors], rel=1e-6)
    assert min(factors) < 50 and max(factors) > 400
    found, _ = nas_bench_bert._correlations(models, values, ["activation_distance"], 0)
    assert found["activation_distance"]["kendall_tau"] == pytest.approx(0.469, abs=0.001)

"""NAS-Bench-BERT: do training-free metrics rank trained FlexiBERT encoders by their GLUE scores?

Serianni & Kalita, ACL 2023, arXiv 2306.00288; data CC BY 4.0. Each network is built untrained, sees one batch, and its
metrics are compared with the published GLUE score (mean of eight development scores x 100): Kendall's τ_b, Spearman's
ρ, and a bootstrap interval by configuration, because nine configurations occur twice. Positive: more is better.

The same within each of the four strata depth x hidden size. Those four cells alone rank the models at τ 0.80, so only
what is left inside them shows that a metric knows more than how large a model is.

Departures from the published protocol: the text is Penn Treebank or Python's help topics, word by word (ids by falling
frequency), not WordPiece of OpenWebText; sequences are cut from continuous text, so there is no padding; no dropout; by
default 4 sequences of 512 tokens, not 128. The initial weights are drawn by other generators.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lmnas.core import places
from lmnas.core.errors import UserError, nearest
from lmnas.core.genotype import Genotype
from lmnas.core.seeds import generator, rng
from lmnas.core.text import columns
from lmnas.methods.proxies.statistics import Undefined, rank_correlations
from lmnas.methods.proxies.transformer import METRICS, TokenNetwork, measure
from lmnas.nn.ops.embedding import TokenEmbedding
from lmnas.report.plots import STYLE, save
from lmnas.spaces.transformer.flexibert import (
    Encoder,
    FlexiBERT,
    Layer,
    as_scored,
    as_trained,
    layers_of,
    metric_body,
    trained_body,
)
from lmnas.tasks.data.corpora import open_corpus

HELP = "rank trained FlexiBERT encoders (NAS-Bench-BERT) by training-free metrics"

FILE = "architectures.jsonl"
VOCABULARY, WIDTH, POSITIONS = 30_522, 128, 512
"""Sizes of the published networks: ELECTRA's vocabulary, embedding width, longest sequence."""
INIT_RANGE = 0.02
FIRST_ID = 1
"""Id of the most frequent word; 0 is the padding token, whose embedding is zero."""
COLOURS = {"2 x 128": "#2f7fd1", "2 x 256": "#d9822b", "4 x 128": "#3d9a6d", "4 x 256": "#a05ec9"}

PUBLISHED = {
    "head_confidence": 0.478,
    "head_confidence_normalized": 0.299,
    "parameters": 0.454,
    "activation_distance": 0.222,
    "activation_distance_normalized": -0.050,
    "softmax_confidence": 0.216,
    "softmax_confidence_normalized": 0.033,
    "synaptic_saliency": 0.188,
    "synaptic_saliency_normalized": -0.137,
    "head_importance": 0.164,
    "head_importance_normalized": -0.036,
    "synaptic_diversity": 0.156,
    "synaptic_diversity_normalized": -0.030,
    "jacobian_covariance": -0.042,
    "jacobian_cosine": 0.003,
    "parameters_as_configured": 0.489,
    "parameters_as_trained": 0.553,
    "depth_width": 0.801,
}
"""τ_b of the released metric values with GLUE over all 500 models, recomputed from the authors' release: shown beside
ours, never used."""


@dataclass(frozen=True)
class Model:
    """A trained model of the benchmark.

    Attributes:
        group: equal for two trainings of one configuration.
        glue: mean of the eight GLUE development scores, x 100.
        columns: the published metrics by their names there.
    """

    id: int
    group: str
    genotype: Genotype
    glue: float
    columns: Mapping[str, float]

    @property
    def stratum(self) -> str:
        return f"{self.genotype.choices['layers']} x {self.genotype.choices['hidden']}"


TABULAR: Mapping[str, Callable[[Genotype], float]] = {
    "depth_width": lambda g: 1000.0 * g.choices["layers"] + g.choices["hidden"],
    "parameters_as_configured": lambda g: _count(g, False),
    "parameters_as_trained": lambda g: _count(g, True),
    "feed_forward_layers": lambda g: float(sum(len(layer.feed_forward) for layer in layers_of(g))),
    "mean_feed_forward_layers": lambda g: TABULAR["feed_forward_layers"](g) / g.choices["layers"],
    "stacked_width": lambda g: float(sum(sum(layer.feed_forward[1:]) for layer in as_trained(layers_of(g)))),
}
"""Scores of the configuration alone, without any network: the four cells depth x hidden size in order; parameters with
the sizes as configured, and with the first feed-forward layer 4 · hidden wide as the released training code has it;
and our own counts of feed-forward layers, of those per layer, and of the units that are stacked upon the first."""
NAMES = (*METRICS, *TABULAR)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--data", type=Path, help=f"{FILE} or its folder (default: nas-bench-bert in LMNAS_DATA)")
    parser.add_argument("--limit", type=int, help="number of models to score, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, probe, --limit and bootstrap (default: 0)")
    parser.add_argument("--metrics", help="names separated by commas (default: all)")
    parser.add_argument("--sequences", type=int, default=4, help="in the batch (default: 4; published: 128)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (default and published: 512)")
    parser.add_argument("--corpus", default="ptb", help="a corpus name or text file for the batch (default: ptb)")
    parser.add_argument(
        "--network",
        choices=["scored", "trained"],
        default="scored",
        help="`scored`: as published, always 256 and 1024 wide (default); `trained`: sizes as configured",
    )


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Score the models and correlate.

    Args:
        options: what `add_arguments` defines.
        say: takes lines of progress.

    Returns:
        `metrics`: name -> kendall_tau, spearman_rho, low, high, n; `strata`: "depth x hidden" -> the same; `inside`:
        name -> kendall_tau, low, high, n over the strata together;
        `published`: the same for the published values of the metric on the same models; `undefined`; `models`: the
        values behind it all; and what identifies the run.

    Raises:
        UserError: bad options, a missing or broken file.
    """
    chosen = _chosen(options.metrics)
    for option, least, most in (("limit", 3, None), ("sequences", 1, None), ("length", 2, POSITIONS)):
        given = getattr(options, option)
        if given is not None and (given < least or (most is not None and given > most)):
            bounds = f"at least {least}" + (f" and at most {most}" if most is not None else "")
            raise UserError(f"--{option}: expected {bounds}, got {given}")
    models, path = read(options.data), _path(options.data)
    if options.limit is not None and options.limit < len(models):
        drawn = rng(options.seed, "nas-bench-bert", "limit").sample(range(len(models)), options.limit)
        models = [models[i] for i in sorted(drawn)]
    measured = [name for name in chosen if name in METRICS]
    tokens, corpus = batch(options.corpus, options.sequences, options.length) if measured else (None, None)
    started, values = time.perf_counter(), []
    embedding = embeddings(options.seed)
    seen: dict[tuple[Layer, ...], dict[str, float | str]] = {}
    for number, model in enumerate(models, start=1):
        row: dict[str, float | str] = {name: TABULAR[name](model.genotype) for name in chosen if name in TABULAR}
        if tokens is not None:
            layers = layers_of(model.genotype)
            # models that differ in what the scored networks ignore are one network
            key = tuple(as_scored(layers) if options.network == "scored" else layers)
            if key not in seen:
                seen[key] = measure(
                    network(model.genotype, options.network, options.seed, embedding), tokens, measured, options.seed
                )
            row |= seen[key]
        values.append(row)
        if number % 10 == 0 or number == len(models):
            say(f"{number} of {len(models)} models, {len(seen)} networks, {time.perf_counter() - started:.0f} s")
    found, undefined = _correlations(models, values, chosen, options.seed)
    strata = {}
    for stratum in sorted({model.stratum for model in models}):
        rows = [i for i, model in enumerate(models) if model.stratum == stratum]
        inside = [models[i] for i in rows]
        strata[stratum] = _correlations(inside, [values[i] for i in rows], chosen, options.seed)[0]
    return {
        "benchmark": "nas-bench-bert",
        "data": path.name,
        "n": len(models),
        "n_networks": len(seen),
        "seed": options.seed,
        "network": options.network,
        "batch": {"sequences": options.sequences, "length": options.length, "text": corpus},
        "metrics": found,
        "strata": strata,
        "inside": {name: pooled for name in found if (pooled := _pooled(strata, name))},
        "published": _published(models, chosen, options.seed),
        "undefined": undefined,
        "seconds": round(time.perf_counter() - started, 3),
        "models": [
            {"id": model.id, "stratum": model.stratum, "glue": model.glue, **row}
            for model, row in zip(models, values, strict=True)
        ],
    }


def _chosen(metrics: str | None) -> list[str]:
    names = [name.strip() for name in metrics.split(",")] if metrics is not None else list(NAMES)
    for name in names:
        if name not in NAMES:
            raise UserError(f"--metrics: {name!r} is unknown. " + nearest(name, NAMES))
    return list(dict.fromkeys(names))


def _path(data: Path | None) -> Path:
    if data is None:
        data = places.data() / "nas-bench-bert"
        if not data.is_dir():
            raise UserError(f"--data is missing: {FILE} of NAS-Bench-BERT or its folder (or set LMNAS_DATA)")
    return data / FILE if data.is_dir() else data


def read(data: Path | None) -> list[Model]:
    """The models of the benchmark's file.

    Args:
        data: the file or its folder; None: nas-bench-bert in LMNAS_DATA.

    Raises:
        UserError: no such file, or a line that is not a model of the reduced FlexiBERT space.
    """
    path = _path(data)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; expected one JSON object a line") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    models = [_model(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if len(models) < 3:
        raise UserError(f"{path}: {len(models)} models; a rank correlation needs at least 3")
    return models


SPACE = FlexiBERT(form="reduced")


def _model(line: str, where: str) -> Model:
    try:
        record = json.loads(line)
        choices: dict[str, Any] = {"hidden": record["hidden_size"], "layers": len(record["encoder_layers"])}
        for i, layer in enumerate(record["encoder_layers"], start=1):
            choices[f"layer_{i}.operation"] = f"{layer['operation_type']}-{layer['operation_parameter']}"
            choices[f"layer_{i}.heads"] = layer["num_operation_heads"]
            choices[f"layer_{i}.feed_forward"] = layer["feed_forward_dimension"]
            choices[f"layer_{i}.stacks"] = layer["num_feed_forward"]
        glue = float(record["scores"]["glue"])
        columns = {str(key): float(value) for key, value in record.get("published_metrics", {}).items()}
        model = Model(record["id"], str(record["group"]), Genotype(SPACE.name, choices), glue, columns)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{where}: not a model of NAS-Bench-BERT ({what})") from None
    if not math.isfinite(glue):
        raise UserError(f"{where}: scores.glue: expected a finite number, got {glue}")
    try:
        SPACE.check(model.genotype)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return model


def batch(text: str, sequences: int, length: int) -> tuple[Tensor, dict[str, Any]]:
    """(B, T) ids from the start of a corpus' training text, and what identifies the corpus.

    A word's id is its rank by frequency; where a corpus has more words than the vocabulary, ranks beyond it begin anew.

    Raises:
        UserError: the text is too short.
    """
    corpus = open_corpus(text)
    ids = corpus.splits["train"][: sequences * length].long()
    if len(ids) < sequences * length:
        raise UserError(
            f"--corpus {text}: {len(ids)} tokens; {sequences} sequences of {length} need {sequences * length}"
        )
    tokens = FIRST_ID + ids % (VOCABULARY - FIRST_ID)
    return tokens.view(sequences, length), {"name": corpus.name, "fingerprint": corpus.fingerprint}


def _body(genotype: Genotype, which: str) -> Encoder:
    return metric_body(genotype, WIDTH) if which == "scored" else trained_body(genotype, WIDTH)


def embeddings(seed: int) -> TokenEmbedding:
    """The untrained token embeddings of every network of a run."""
    made = TokenEmbedding(VOCABULARY, WIDTH, POSITIONS)
    made.initialise(generator(seed, "untrained-embeddings"), INIT_RANGE)
    return made


def network(genotype: Genotype, which: str, seed: int, embedding: TokenEmbedding) -> TokenNetwork:
    """An untrained network as published, its weights drawn from `seed`: `scored` or `trained` (see the space)."""
    made = TokenNetwork(embedding, _body(genotype, which))
    made.initialise_body(seed, INIT_RANGE)
    return made


def _count(genotype: Genotype, first_is_4h: bool) -> float:
    with torch.device("meta"):
        made = TokenNetwork(TokenEmbedding(VOCABULARY, WIDTH, POSITIONS), trained_body(genotype, WIDTH, first_is_4h))
    return float(sum(parameter.numel() for parameter in made.parameters()))


def _correlations(
    models: Sequence[Model], values: Sequence[Mapping[str, float | str]], names: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Correlations of each metric with GLUE over the models where it is defined; the first reason where it is not."""
    found, undefined = {}, {}
    for name in names:
        rows = [i for i, row in enumerate(values) if not isinstance(row[name], str)]
        reasons = [row[name] for row in values if isinstance(row[name], str)]
        if reasons:
            undefined[name] = f"{len(reasons)} of {len(values)} models: {reasons[0]}"
        kept = [models[i] for i in rows]
        try:
            scores = [float(values[i][name]) for i in rows]
            found[name] = rank_correlations(scores, [m.glue for m in kept], [m.group for m in kept], seed)
        except Undefined as reason:
            undefined[name] = str(reason)
    return found, undefined


def _pooled(strata: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, float]:
    """The mean τ inside the strata, weighted by their models, and its 95 % interval; empty where it is defined in none.

    The strata share no model, so the variance of the mean is the weighted sum of theirs, each read from its bootstrap
    interval as if that were normal: ± 1.96 standard errors.
    """
    cells = [cell[name] for cell in strata.values() if name in cell]
    n = sum(cell["n"] for cell in cells)
    if not cells or not all(math.isfinite(cell["high"] - cell["low"]) for cell in cells):
        return {}
    tau = sum(cell["n"] * cell["kendall_tau"] for cell in cells) / n
    half = math.hypot(*(cell["n"] * (cell["high"] - cell["low"]) / 2 for cell in cells)) / n
    return {"kendall_tau": tau, "low": tau - half, "high": tau + half, "n": n}


def _published(models: Sequence[Model], names: Sequence[str], seed: int) -> dict[str, Any]:
    """The published values of the chosen metrics on the same models."""
    found: dict[str, Any] = {}
    for name in names:
        column = METRICS[name].published if name in METRICS else None
        if column is None:
            continue
        kept = [model for model in models if column in model.columns]
        values = [{name: model.columns[column]} for model in kept]
        found |= _correlations(kept, values, [name], seed)[0]
    return found


def text(document: Mapping[str, Any]) -> str:
    """The table of a document of `run`."""
    size, strata = document["batch"], list(document["strata"])
    header = ["metric", "tau", "interval", "rho", "n", "published", "of 500", "inside", *strata]
    rows = []
    for name, found in sorted(document["metrics"].items(), key=lambda item: -item[1]["kendall_tau"]):
        column = document["published"].get(name)
        cells = [document["strata"][stratum].get(name) for stratum in strata]
        rows.append(
            [
                name,
                f"{found['kendall_tau']:.3f}",
                _interval(found),
                f"{found['spearman_rho']:.3f}",
                str(found["n"]),
                f"{column['kendall_tau']:.3f}" if column else "",
                f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else "",
                _with_interval(document["inside"].get(name)),
                *(f"{cell['kendall_tau']:.3f}" if cell else "-" for cell in cells),
            ]
        )
    lines = [
        f"NAS-Bench-BERT: {document['n']} models ({document['n_networks']} networks, `{document['network']}`), "
        f"{size['sequences']} x {size['length']} tokens, seed {document['seed']}, {document['seconds']:.0f} s",
        "Kendall's tau_b of metric and GLUE (positive: more is better), 95 % bootstrap interval by configuration;",
        "`published`: the released values on the same models, and on all 500; then tau inside depth x hidden size, "
        "pooled and one by one",
        "",
        columns(header, rows),
        *(f"{name}: undefined for {reason}" for name, reason in document["undefined"].items()),
    ]
    return "\n".join(lines)


def _with_interval(found: Mapping[str, float] | None) -> str:
    return f"{found['kendall_tau']:.3f} {_interval(found)}" if found else "-"


def _interval(found: Mapping[str, float]) -> str:
    return f"[{found['low']:.3f}, {found['high']:.3f}]"


def pictures(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """A scatter plot of GLUE against each metric, a colour for each depth x hidden size; SVG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, found in document["metrics"].items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(4.2, 3.0), layout="constrained")
            panel = figure.subplots()
            for stratum, colour in COLOURS.items():
                points = [
                    (model[name], model["glue"])
                    for model in document["models"]
                    if model["stratum"] == stratum and not isinstance(model[name], str)
                ]
                if points:
                    panel.plot(*zip(*points, strict=True), "o", color=colour, label=stratum, markersize=3, alpha=0.8)
            panel.set_title(f"tau {found['kendall_tau']:.3f} {_interval(found)}, n = {found['n']}")
            panel.set_xlabel(name.replace("_", " "))
            panel.set_ylabel("GLUE")
            panel.legend(title="layers x hidden", loc="lower right")
        path = folder / f"nas-bench-bert-{name}.svg"
        save(figure, path)
        paths.append(path)
    return paths

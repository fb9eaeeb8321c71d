"""Training-free scores of architectures: what `lmnas score` prints.

Every network is scored untrained, on one batch of text. Values are the metrics' own; the tables of a benchmark turn
them so that higher is better.
"""

import csv
import io
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmnas.core import registry
from lmnas.core.contracts import Body, Space
from lmnas.core.errors import UserError, nearest
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator, rng
from lmnas.core.text import columns
from lmnas.methods.proxies import predictor, transformer
from lmnas.methods.proxies.recurrent import METRICS, measure
from lmnas.methods.proxies.statistics import Undefined
from lmnas.nn.kernels.library import exact_onednn_products, keep_freed_memory
from lmnas.runs.jobs import covering_space
from lmnas.tasks.data.corpora import open_corpus

COLUMNS, STEPS = 50, 70
"""The paper's batch of text."""
INIT_RANGE = 0.1
"""Of the embedding (Klyuchnikov et al., 2020)."""

Values = dict[str, float | str]
"""Metric -> value, or the reason why it is undefined."""


@dataclass(frozen=True)
class Protocol:
    """How networks are scored; a value, so that other processes can be handed it.

    Attributes:
        data: the corpus whose words are counted and whose text is read.
        split: where the batch comes from.
        width: of embedding and output.
        inner: widths of layers before the last, for spaces that stack.
        seed: of the weights and of the metrics' noise.
    """

    data: str
    split: str
    width: int
    inner: tuple[int, ...]
    seed: int


DEFAULTS = {
    "recurrent": ("hidden_covariance_1", "jacobian_cosine", "parameters"),
    "transformer": ("head_confidence", "w_pca", "parameters"),
}
"""Kind of body -> the metrics that `lmnas score` shows unless others are asked for."""


def known_metrics(kind: str = "recurrent") -> list[str]:
    return [*METRICS, *predictor.SCORES] if kind == "recurrent" else [*transformer.METRICS]


def check_metrics(text: str | None, default: Sequence[str], kind: str = "recurrent") -> list[str]:
    """The metrics named in `a,b`; `all` for all that bodies of this kind have.

    Raises:
        UserError: an unknown name.
    """
    if text is None:
        return list(default)
    known = known_metrics(kind)
    names = known if text == "all" else list(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in known:
            others = [other for other in DEFAULTS if other != kind and name in known_metrics(other)]
            fits = f"is for {others[0]} bodies, these are {kind} ones. " if others else "is unknown. "
            raise UserError(f"--metrics: {name!r} {fits}" + nearest(name, known))
    if not names:
        raise UserError(f"--metrics: expected names, such as {','.join(DEFAULTS[kind][:2])}")
    return names


def batch_of_text(data: str, split: str) -> tuple[Tensor, int]:
    """(70, 50) tokens, the first of as many contiguous columns, and the size of the vocabulary.

    Raises:
        UserError: the text is too short.
    """
    corpus = open_corpus(data, level="word", tokenizer=None, min_count=None, max_vocabulary=None)
    tokens = corpus.splits[split]
    rows = len(tokens) // COLUMNS
    if rows < STEPS:
        raise UserError(
            f"data {data!r}: its {split} split has {len(tokens)} tokens, a batch takes at least {COLUMNS * STEPS}"
        )
    return tokens[: rows * COLUMNS].view(COLUMNS, rows)[:, :STEPS].t().long().contiguous(), len(corpus.vocabulary)


def score(
    space: Space, genotype: Genotype, protocol: Protocol, text: tuple[Tensor, int], metrics: Iterable[str]
) -> Values:
    """All `metrics` of one architecture; those that share passes are measured together."""
    chosen = list(metrics)
    if space.kind == "transformer":
        body = space.build(genotype, protocol.width)
        return transformer.measure(
            transformer.untrained(body, text[1], protocol.seed), text[0].t(), chosen, protocol.seed
        )
    values: Values = {}
    shared = [name for name in chosen if name in METRICS]
    if shared:
        body, embedding = network(space, genotype, protocol, text[1])
        values |= measure(body, embedding, text[0], shared, protocol.seed)
    if len(shared) < len(chosen):
        values |= predicted(space, genotype, [name for name in chosen if name not in METRICS])
    return {name: values[name] for name in chosen}


def network(space: Any, genotype: Genotype, protocol: Protocol, vocabulary: int) -> tuple[Body, Tensor]:
    """An untrained recurrent body, stacked where the space can, and its (V, H) embedding."""
    if protocol.inner and hasattr(space, "stack"):
        body = space.stack(genotype, protocol.width, (*protocol.inner, protocol.width))
    else:
        body = space.build(genotype, protocol.width)
    draws = generator(protocol.seed, "init")
    embedding = torch.empty(vocabulary, protocol.width).uniform_(-INIT_RANGE, INIT_RANGE, generator=draws)
    body.initialise(draws, INIT_RANGE)
    return body, embedding


def predicted(space: Any, genotype: Genotype, names: Sequence[str]) -> Values:
    """The quick predictors; their own network and seed, so that they depend on the graph alone."""
    if not hasattr(space, "stack"):
        return dict.fromkeys(names, f"space {space.name!r} is no graph")
    try:
        cell = predictor.features(space, canonical(space, genotype))
    except Undefined as reason:
        return dict.fromkeys(names, str(reason))
    return {name: predictor.SCORES[name](cell) for name in names}


def canonical(space: Any, genotype: Genotype) -> Genotype:
    """The genotype that all isomorphic cells share, where the space has such a form."""
    return space.genotype(genotype.choices) if hasattr(space, "genotype") else genotype


# ------------------------------------------------------------------------------------------------- many architectures


_worker: dict[str, Any] = {}


def _leave_with_parent() -> None:
    """A worker of a killed process waits for work for ever: its siblings keep the queue open."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _start(protocol: Protocol, metrics: list[str], needs_text: bool) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    text = batch_of_text(protocol.data, protocol.split) if needs_text else None
    _worker.update(protocol=protocol, metrics=metrics, text=text)


def _work(document: dict[str, Any]) -> Values:
    genotype = Genotype.from_dict(document)
    with exact_onednn_products():
        return score(covering_space(genotype), genotype, _worker["protocol"], _worker["text"], _worker["metrics"])


def score_all(genotypes: Sequence[Genotype], protocol: Protocol, metrics: list[str], workers: int) -> Iterator[Values]:
    """The values of every genotype, in order, as they come; `workers` processes of one thread each."""
    needs_text = any(name not in predictor.SCORES for name in metrics)
    documents = [genotype.to_dict() for genotype in genotypes]
    if workers <= 1:
        threads = torch.get_num_threads()
        try:
            _start(protocol, metrics, needs_text)
            for document in documents:
                yield _work(document)
        finally:
            torch.set_num_threads(threads)
        return
    if needs_text:
        batch_of_text(protocol.data, protocol.split)  # a text that is missing is told here, not by a worker that dies
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (protocol, metrics, needs_text)) as pool:
        yield from pool.map(_work, documents, chunksize=1)


# ----------------------------------------------------------------------------------------------------------- command


def read_genotypes(source: str) -> list[tuple[str, Genotype]]:
    """(name, genotype) of a genotype's file or name, or of every line of a .jsonl file.

    A line is a genotype document, or an entry of the NAS-Bench-NLP table (`id`, `recipe`).

    Raises:
        UserError: no such thing, or a line that is neither.
    """
    if not source.endswith(".jsonl"):
        return [(Path(source).stem, load_genotype(source))]
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{source}, line {number}: not JSON ({error})") from None
        if isinstance(document, dict) and isinstance(document.get("recipe"), dict):
            document = {"format": 1, "space": "recurrent-graph", "choices": document["recipe"], **_named(document)}
        genotype = Genotype.from_dict(document, f"{source}, line {number}")
        found.append((str(document.get("name", document.get("id", genotype.id))), genotype))
    if not found:
        raise UserError(f"{source}: has no genotypes")
    return found


def _named(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: document[key] for key in ("name", "id") if key in document}


def sampled(space: str, n: int, seed: int) -> list[tuple[str, Genotype]]:
    """`n` random genotypes of a space with its default settings, the k-th drawn with (seed, k)."""
    opened = registry.create("space", {"name": space})
    drawn = [opened.sample(rng(seed, "sample", k)) for k in range(n)]
    return [(genotype.id, genotype) for genotype in drawn]


def one_kind(genotypes: Sequence[Genotype]) -> str:
    """The kind of body that all `genotypes` make.

    Raises:
        UserError: not a genotype of its space, a kind without metrics, or several kinds.
    """
    kinds: dict[str, Genotype] = {}
    for genotype in genotypes:
        kinds.setdefault(covering_space(genotype).kind, genotype)
    for kind, genotype in kinds.items():
        if kind not in DEFAULTS:
            raise UserError(
                f"genotype {genotype.id}: space {genotype.space!r} makes {kind} bodies, and there are metrics for "
                f"{' and '.join(DEFAULTS)} ones only"
            )
    if len(kinds) > 1:
        raise UserError(
            f"expected architectures of one kind, whose metrics are the same, got {' and '.join(sorted(kinds))}"
        )
    return next(iter(kinds))


def run(options: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """The JSON document of `lmnas score`."""
    if (options.source is None) == (options.sample is None):
        raise UserError("expected a genotype (or a .jsonl file of them) or --sample N --space NAME, one of the two")
    for option, value in (("--width", options.width), ("--workers", options.workers), ("--sample", options.sample)):
        if value is not None and value < 1:
            raise UserError(f"{option}: expected at least 1, got {value}")
    if options.sample is None:
        named = read_genotypes(options.source)
    elif options.space is None:
        raise UserError(f"--sample: needs --space. Known: {', '.join(registry.names('space'))}.")
    else:
        named = sampled(options.space, options.sample, options.seed)
    kind = one_kind([genotype for _, genotype in named])  # all are checked before the first is measured
    metrics = check_metrics(options.metrics, DEFAULTS[kind], kind)
    protocol = Protocol(options.data, "valid", options.width, (), options.seed)
    rows = []
    for (name, genotype), values in zip(
        named, score_all([g for _, g in named], protocol, metrics, options.workers), strict=True
    ):
        rows.append(
            {
                "name": name,
                "genotype_id": genotype.id,
                "space": genotype.space,
                "metrics": {key: None if isinstance(value, str) else value for key, value in values.items()},
                "undefined": {key: value for key, value in values.items() if isinstance(value, str)},
            }
        )
        say(f"[{len(rows)}/{len(named)}] {name}")
    return {
        "scores": rows,
        "metrics": metrics,
        "data": options.data,
        "split": protocol.split,
        "width": options.width,
        "seed": options.seed,
    }


def text(document: Mapping[str, Any]) -> str:
    """Aligned columns; `-` where a metric is undefined, the reasons below."""
    metrics = document["metrics"]
    rows = [
        [row["name"], *("-" if (value := row["metrics"][name]) is None else f"{value:,.6g}" for name in metrics)]
        for row in document["scores"]
    ]
    reasons = {(name, why) for row in document["scores"] for name, why in row["undefined"].items()}
    lines = [f"{name}: undefined where {why}" for name, why in sorted(reasons)]
    return "\n".join([columns(["architecture", *metrics], rows), *lines])


def csv_text(document: Mapping[str, Any]) -> str:
    """One line an architecture; empty where a metric is undefined."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["name", "genotype_id", "space", *document["metrics"]])
    for row in document["scores"]:
        values = (row["metrics"][name] for name in document["metrics"])
        writer.writerow(
            [row["name"], row["genotype_id"], row["space"], *("" if v is None else repr(v) for v in values)]
        )
    return file.getvalue().rstrip("\n")

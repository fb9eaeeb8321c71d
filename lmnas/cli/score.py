"""Training-free scores of architectures: the output of `lmnas score`.

Every network is scored untrained, on one batch of text. Values are the metrics' own; the tables of a benchmark turn
them so that higher is better.
"""

import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmnas.core import registry
from lmnas.core.capabilities import phrase
from lmnas.core.contracts import Body, GraphSpace, Space
from lmnas.core.errors import Interrupted, UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.core.seeds import generator, rng
from lmnas.core.text import columns
from lmnas.core.updates import Report, never, silent
from lmnas.core.updates import Stop as StopAsked
from lmnas.methods.proxies.family import Subject, Values, families, family_of, listed, measured
from lmnas.nn.kernels.library import exact_onednn_products, keep_freed_memory
from lmnas.runs.build import covering_space
from lmnas.runs.executors.base import Call, Setup, open_executor
from lmnas.runs.progress import Display, Stop
from lmnas.tasks.data.corpora import open_corpus

COLUMNS, STEPS = 50, 70
"""Sequences and length of the paper's batch of text."""
INIT_RANGE = 0.1
"""Range of the initial embedding (Klyuchnikov et al., 2020)."""


@dataclass(frozen=True)
class Protocol:
    """Settings of the scoring of networks; a value, so that it can be sent to other processes.

    Attributes:
        data: the corpus whose words are counted and whose text is read.
        split: split that the batch is taken from.
        width: of embedding and output.
        inner: widths of layers before the last, for spaces that stack.
        seed: of the weights and of the metrics' noise.
    """

    data: str
    split: str
    width: int
    inner: tuple[int, ...]
    seed: int


def check_metrics(text: str | None, default: Sequence[str], space: Space) -> list[str]:
    """The metrics named in `a,b`; `all` for all that bodies of `space` have.

    Raises:
        UserError: an unknown name.
    """
    if text is None:
        return list(default)
    known = [name for family in listed(space.makes) for name in family.metrics]
    names = known if text == "all" else list(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in known:
            family_of(name, space, "--metrics:")
    if not names:
        raise UserError(f"--metrics: expected names, such as {','.join(known[:2])}")
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

    def untrained() -> tuple[Body, Tensor]:
        return network(space, genotype, protocol, text[1])

    return measured(Subject(space, genotype, protocol.width, protocol.seed, lambda: text, untrained), list(metrics))


def network(space: Space, genotype: Genotype, protocol: Protocol, vocabulary: int) -> tuple[Body, Tensor]:
    """An untrained body, stacked where the space can, and its (V, H) embedding."""
    if protocol.inner and isinstance(space, GraphSpace):
        body = space.stack(genotype, protocol.width, (*protocol.inner, protocol.width))
    else:
        body = space.build(genotype, protocol.width)
    draws = generator(protocol.seed, "init")
    embedding = torch.empty(vocabulary, protocol.width).uniform_(-INIT_RANGE, INIT_RANGE, generator=draws)
    body.initialise(draws, INIT_RANGE)
    return body, embedding


# ------------------------------------------------------------------------------------------------- many architectures


NO_TEXT = torch.empty(0, 0, dtype=torch.long), 0
_text = functools.lru_cache(maxsize=1)(batch_of_text)
"""One text serves all architectures that a process scores."""


def score_one(
    *, genotype: Any, protocol: Any, metrics: list[str], needs_text: bool, report: Report, stop: StopAsked
) -> Values:
    """Target of the `Call` of one architecture."""
    keep_freed_memory()
    given = Protocol(**{**protocol, "inner": tuple(protocol["inner"])})
    text = _text(given.data, given.split) if needs_text else NO_TEXT
    architecture = Genotype.from_dict(genotype)
    with exact_onednn_products():
        return score(covering_space(architecture), architecture, given, text, metrics)


def score_all(
    genotypes: Sequence[Genotype],
    protocol: Protocol,
    metrics: list[str],
    workers: int,
    report: Report = silent,
    stop: StopAsked = never,
) -> Iterator[Values]:
    """The values of every genotype, in order, as they come; `workers` processes of one thread each.

    Raises:
        Interrupted: `stop` said so.
    """
    textless = {name for family in families() if not family.reads_text for name in family.metrics}
    shared = {"protocol": asdict(protocol), "metrics": metrics, "needs_text": not textless.issuperset(metrics)}
    if shared["needs_text"]:
        _text.cache_clear()  # the file may have changed; and one that is missing is told here, not by a worker
        _text(protocol.data, protocol.split)
    calls = [
        Call(str(number), f"{__name__}:score_one", {"genotype": genotype.to_dict(), **shared})
        for number, genotype in enumerate(genotypes)
    ]
    done: dict[str, Values] = {}
    number = 0
    with open_executor(None, workers, Setup(threads=1), report, stop) as executor:
        for name, values in executor.run(calls):
            done[name] = values
            while str(number) in done:
                yield done.pop(str(number))
                number += 1


# ----------------------------------------------------------------------------------------------------------- command


def read_genotypes(source: str) -> list[tuple[str, Genotype]]:
    """(name, genotype) of a genotype's file or name, or of every line of a .jsonl file.

    A line is a genotype document, or an entry of a space's published table.

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
        if isinstance(document, dict) and "space" not in document:
            document = _of_table(document)
        genotype = Genotype.from_dict(document, f"{source}, line {number}")
        found.append((str(document.get("name", document.get("id", genotype.id))), genotype))
    if not found:
        raise UserError(f"{source}: has no genotypes")
    return found


def _of_table(entry: dict[str, Any]) -> dict[str, Any]:
    """The genotype's document that an entry of a space's published table stands for; else the entry itself."""
    spaces = (registry.component("space", name) for name in registry.names("space"))
    return next((document for space in spaces if (document := space.from_table(entry)) is not None), entry)


def sampled(space: str, n: int, seed: int) -> list[tuple[str, Genotype]]:
    """`n` random genotypes of a space with its default settings, the k-th drawn with (seed, k)."""
    opened = registry.create("space", {"name": space})
    drawn = [opened.sample(rng(seed, "sample", k)) for k in range(n)]
    return [(genotype.id, genotype) for genotype in drawn]


def one_table(genotypes: Sequence[Genotype]) -> Space:
    """A space whose bodies have the metrics of all `genotypes`.

    Raises:
        UserError: not a genotype of its space, no metrics, or other metrics than the first one's.
    """
    spaces = [covering_space(genotype) for genotype in genotypes]
    first = spaces[0]
    for genotype, space in zip(genotypes, spaces, strict=True):
        if not listed(space.makes):
            raise UserError(
                f"genotype {genotype.id}: no metric is defined for {phrase(space.makes)} bodies, which space "
                f"{space.name!r} makes"
            )
        if [type(family) for family in listed(space.makes)] != [type(family) for family in listed(first.makes)]:
            raise UserError(
                f"expected architectures whose metrics are the same, got spaces {first.name!r} and {space.name!r}"
            )
    return first


def run(options: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """The JSON document of `lmnas score`; after a stop, with `interrupted` and the scores made so far."""
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
    space = one_table([genotype for _, genotype in named])  # all are checked before the first is measured
    metrics = check_metrics(options.metrics, [name for family in listed(space.makes) for name in family.shown], space)
    protocol = Protocol(options.data, "valid", options.width, (), options.seed)
    rows: list[dict[str, Any]] = []
    interrupted = {}
    with Display() as display, Stop(display) as stop:
        scored = score_all(
            [g for _, g in named], protocol, metrics, options.workers, display.update, lambda: stop.asked
        )
        try:
            for (name, genotype), values in zip(named, scored, strict=True):
                rows.append(_row(name, genotype, values))
                say(f"[{len(rows)}/{len(named)}] {name}")
        except Interrupted:
            interrupted = {"interrupted": True}
    return {
        "scores": rows,
        "metrics": metrics,
        "data": options.data,
        "split": protocol.split,
        "width": options.width,
        "seed": options.seed,
        **interrupted,
    }


def _row(name: str, genotype: Genotype, values: Values) -> dict[str, Any]:
    return {
        "name": name,
        "genotype_id": genotype.id,
        "space": genotype.space,
        "metrics": {key: None if isinstance(value, str) else value for key, value in values.items()},
        "undefined": {key: value for key, value in values.items() if isinstance(value, str)},
        "genotype": genotype.to_dict(),
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
    writer.writerow(["name", "genotype_id", "space", *document["metrics"], "genotype"])
    for row in document["scores"]:
        values = (row["metrics"][name] for name in document["metrics"])
        shown = ("" if value is None else repr(value) for value in values)
        writer.writerow([row["name"], row["genotype_id"], row["space"], *shown, json.dumps(row["genotype"])])
    return file.getvalue().rstrip("\n")

"""The command line. Results go to standard output (one JSON object with --json), progress to standard error.

Exit codes: 0 done, 2 the user's mistake (one line says which), 130 interrupted with the state saved.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lmnas.cli.bench import BENCHES, open_bench
from lmnas.core import registry
from lmnas.core.errors import Interrupted, UserError
from lmnas.core.version import VERSION
from lmnas.nn.kernel_table import CHOICES

STAGE_COMMANDS = {
    "select": "retrain the best candidates shortly",
    "train": "train the winner and the baselines from scratch",
    "test": "test every trained model once, and load the saved one back",
    "report": "write report.html anew",
}


class Parser(argparse.ArgumentParser):
    """Errors as one line and exit code 2, like every other mistake."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="lmnas", description="Finds neural architectures for language and trains the one it found.")
    top.add_argument("--version", action="version", version=f"lmnas {VERSION}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        added.add_argument("--json", action="store_true", help="one JSON object on standard output")
        return added

    search = command("search", "search, select, train, test and report; run again to continue")
    search.add_argument("recipe", help="a shipped recipe's name (see `lmnas list recipes`) or a YAML file")
    search.add_argument("--run", type=Path, help="the run directory (default: runs/RECIPE)")
    search.add_argument("--data", help="a corpus name, a text file or a folder with train, valid and test files")
    search.add_argument("--genotype", help="train this genotype (file or name) instead of searching for one")
    search.add_argument(
        "--kernel", help=f"what runs the recurrent cell: {', '.join(CHOICES)} (default: as the run began)"
    )
    search.epilog = "Any value of the recipe may be given by its dotted name: --train.seeds 5 --strategy random"

    for name, text in STAGE_COMMANDS.items():
        stage = command(name, f"{text}, in a run directory")
        stage.add_argument("run", type=Path, help="the run directory")

    listing = command("list", "list what there is")
    listing.add_argument(
        "what", nargs="?", choices=["spaces", "strategies", "estimators", "tasks", "recipes", "genotypes"]
    )

    show = command("show", "draw and describe a genotype")
    show.add_argument("genotype", help="a genotype file or a shipped name, such as darts-v2")
    show.add_argument("--width", type=int, help="count the parameters of a language model of this width")
    show.add_argument("--vocabulary", type=int, help="words of that language model")
    show.add_argument("--out", type=Path, help="where the pictures go (default: the current folder)")

    score = command("score", "score architectures without training them")
    score.add_argument("source", nargs="?", help="a genotype file or shipped name, or a .jsonl file of many")
    score.add_argument("--sample", type=int, metavar="N", help="score N random architectures of --space instead")
    score.add_argument("--space", help="the space to sample")
    score.add_argument("--metrics", help="names separated by commas, or all")
    score.add_argument("--data", default="pydoc", help="the text that the networks read (default: pydoc)")
    score.add_argument("--width", type=int, default=200, help="of embedding and body (default: 200)")
    score.add_argument("--seed", type=int, default=0, help="of weights, noise and samples")
    score.add_argument("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    score.add_argument("--csv", action="store_true", help="comma-separated values on standard output")

    compress = command("compress", "take units out of a trained recurrent model and leave a smaller dense one")
    compress.add_argument("run", type=Path, help="a run directory with a trained LSTM or plain recurrent network")
    compress.add_argument("--out", type=Path, help="the compressed model's directory (default: RUN/compressed)")
    compress.add_argument(
        "--strength", type=float, help="lambda (default: where evidence is against half of the units)"
    )
    compress.add_argument("--rounds", type=int, default=3, help="curvature, update and training (default: 3)")
    compress.add_argument("--round-epochs", type=int, default=1, help="training passes a round (default: 1)")
    compress.add_argument("--epochs", type=int, default=1, help="fine-tuning of the smaller model (default: 1)")
    compress.add_argument("--learning-rate", type=float, help="of SGD (default: a quarter of the run's, 1 after Adam)")
    compress.add_argument(
        "--pruning", choices=["dynamic", "last"], default="dynamic", help="every round, or at the end"
    )
    compress.add_argument("--share", type=float, default=0.25, help="of the units, the most that a round takes (0.25)")
    compress.add_argument("--threshold", type=float, default=0.01, help="norm by the largest, that is zero (0.01)")
    compress.add_argument("--curvature", choices=["sampled", "recursion"], default="sampled", help="(default: sampled)")
    compress.add_argument("--seed", type=int, default=0, help="of batches, noise and labels")

    bench = command("bench", "measure this machine, or compare with a published benchmark")
    bench.add_argument("name", help=f"one of {', '.join(BENCHES)}; `lmnas bench NAME --help` lists its options")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the bench's options")
    return top


def bench_parser(name: str) -> argparse.ArgumentParser:
    """The options of one bench; the top parser leaves them alone, since its modules are imported only when asked for.

    Raises:
        UserError: unknown bench.
    """
    module = open_bench(name)
    options = Parser(prog=f"lmnas bench {name}", description=f"{module.HELP[0].upper()}{module.HELP[1:]}.")
    options.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options.add_argument("--out", type=Path, help="draw pictures into this folder (default: none are drawn)")
    module.add_arguments(options)
    return options


def parse_overrides(rest: Sequence[str]) -> dict[str, Any]:
    """`--a.b 3 --c=d` -> {"a.b": 3, "c": "d"}; values are YAML."""
    overrides: dict[str, Any] = {}
    items = list(rest)
    while items:
        item = items.pop(0)
        if not item.startswith("--") or item == "--":
            raise UserError(f"unexpected argument {item!r}; overrides look like --train.seeds 5")
        name, equals, text = item[2:].partition("=")
        if not equals:
            if not items:
                raise UserError(f"--{name}: a value is missing")
            text = items.pop(0)
            if text.startswith("--"):
                raise UserError(f"--{name}: a value is missing before {text}")
        if name in overrides:
            raise UserError(f"--{name}: given twice")
        try:
            overrides[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--{name}: {text!r} is not a YAML value") from None
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        options, rest = parser().parse_known_args(arguments)
        if rest and options.command not in ("search", "bench"):
            raise UserError(f"unexpected argument {rest[0]!r} (see `lmnas {options.command} --help`)")
        return COMMANDS[options.command](options, rest)
    except UserError as error:
        note(f"lmnas: {error}")
        return 2
    except BrokenPipeError:  # the reader has seen enough; what is left goes nowhere, also at the interpreter's end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        note(f"lmnas: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        note("lmnas: stopped before the work began")
        return 130


def say(options: argparse.Namespace, document: dict[str, Any], text: str) -> None:
    """The command's answer: JSON if asked for, else text."""
    print(json.dumps(document) if options.json else text, flush=True)


def _search(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lmnas.runs.recipe import load_recipe

    overrides = parse_overrides(rest)
    for option, dotted in (("data", "task.data"), ("genotype", "genotype"), ("kernel", "execution.kernel")):
        given = getattr(options, option)
        if given is not None and dotted in overrides:
            raise UserError(f"--{option} and --{dotted}: give one of them")
        if given is not None:
            overrides[dotted] = given
    recipe = load_recipe(options.recipe, overrides)
    return _stages(options, options.run or Path("runs") / recipe.name, recipe, None)


def _stage(options: argparse.Namespace, rest: Sequence[str]) -> int:
    return _stages(options, options.run, None, options.command)


def _stages(options: argparse.Namespace, path: Path, recipe: Any, stage: str | None) -> int:
    from lmnas.core.contracts import Objective
    from lmnas.report.tables import plain_text
    from lmnas.runs.directory import Run
    from lmnas.runs.experiment import STAGES, Experiment
    from lmnas.runs.progress import Display
    from lmnas.runs.start import start

    started = None if recipe is None else start(recipe, path)  # before there is a run directory
    with Run(path, recipe) as run, Display() as display:
        experiment = Experiment(run, display, started)
        stages = STAGES if stage is None else tuple(dict.fromkeys((stage, "report")))
        try:
            results = experiment.run_stages(stages)
        except Interrupted:
            run.note("interrupted")
            again = f"lmnas search {options.recipe} --run {path}" if stage is None else f"lmnas {stage} {path}"
            note(f"lmnas: stopped, everything is saved; the same command continues ({again})")
            return 130
        report = path / "report.html"
        document = {**results, "run": str(path), "report": str(report)}
        lines = []
        if results["verdict"]:
            table = plain_text(results["verdict"], Objective(**results["objective"]))
            lines = [table, "", results["verdict"]["sentence"]]
        if stage == "test":
            document["reloaded"] = reloaded = experiment.reload()
            lines.append(f"saved model, loaded back: {reloaded['value']:.6f} (recorded {reloaded['recorded']:.6f})")
        lines.append(f"report: {report}")
    say(options, document, "\n".join(lines))
    return 0


def _list(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lmnas.core.genotype import load_document, shipped_names
    from lmnas.runs.recipe import read_yaml, recipe_names, recipe_path

    kinds = {"spaces": "space", "strategies": "strategy", "estimators": "estimator", "tasks": "task"}
    found: dict[str, dict[str, str]] = {
        title: {name: registry.summary(kind, name) for name in registry.names(kind)} for title, kind in kinds.items()
    }
    found["recipes"] = {name: read_yaml(recipe_path(name)).get("description", "") for name in recipe_names()}
    found["genotypes"] = {name: load_document(name).get("source", "") for name in shipped_names()}
    chosen = {options.what: found[options.what]} if options.what else found
    lines = []
    for title, entries in chosen.items():
        lines += [title, *(f"  {name:<26} {text}" for name, text in entries.items())]
    say(options, chosen, "\n".join(lines))
    return 0


def _show(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lmnas.cli.show import describe

    document, text = describe(options.genotype, options.width, options.vocabulary, options.out or Path("."))
    say(options, document, text)
    return 0


def _score(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lmnas.cli import score

    if options.csv and options.json:
        raise UserError("--csv and --json: give one of them")
    document = score.run(options, note)
    say(options, document, score.csv_text(document) if options.csv else score.text(document))
    return 130 if "interrupted" in document else 0


def _compress(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from lmnas.runs import compress
    from lmnas.runs.progress import Display

    try:
        with Display() as display:
            document = compress.run(options, display)
    except Interrupted:
        note("lmnas: stopped, everything is saved; the same command continues")
        return 130
    say(options, document, compress.text(document))
    return 0


def _bench(options: argparse.Namespace, rest: Sequence[str]) -> int:
    inner = bench_parser(options.name).parse_args(options.rest)
    inner.json |= options.json
    if inner.out is not None:
        try:
            inner.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {inner.out}: pictures cannot be written ({error.strerror})") from None
    module = open_bench(options.name)
    document = module.run(inner, note)
    lines = [] if inner.json else [module.text(document)]
    if inner.out is not None:
        pictures = [str(path) for path in module.pictures(document, inner.out)]
        document = {**document, "pictures": pictures}
        lines.append(f"pictures: {', '.join(pictures)}")
    say(inner, document, "\n".join(lines))
    return 0


def note(line: str) -> None:
    """A line on standard error; where that is full or closed, the line is lost."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


COMMANDS = {
    "search": _search,
    **dict.fromkeys(STAGE_COMMANDS, _stage),
    "list": _list,
    "show": _show,
    "score": _score,
    "compress": _compress,
    "bench": _bench,
}

if __name__ == "__main__":
    sys.exit(main())

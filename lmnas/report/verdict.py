"""The honest verdict: what the test scores say about the searched architecture, in one sentence with its numbers.

Every baseline is compared with the searched architecture by Welch's t-test (two-sided, unequal variances; Welch, 1947)
over training seeds. The levels are not corrected for the number of baselines. Anything that is not evidence - one seed,
no spread, the same architecture twice - is called that rather than given a p-value.
"""

import contextlib
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from lmnas.core import registry
from lmnas.core.capabilities import lacking
from lmnas.core.contracts import Objective, Space, Task
from lmnas.core.errors import UserError

TEST = "Welch's t-test, two-sided"
SEARCHED = "searched"
RANDOM = "random"
"""The best of random candidates: a baseline of every search."""


@dataclass(frozen=True)
class Wording:
    """Names of models in the sentence.

    Attributes:
        noun: what one searched architecture is: a cell, a network.
        baselines: hand-made networks that a verdict wants, and what each is called: `lstm` -> `LSTM`.
    """

    noun: str = "cell"
    baselines: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, space: Space, task: Task) -> "Wording":
        """The words for a run in `space` on `task`, whose baselines are the hand-made networks that fit the task."""
        found = {}
        for name in registry.names("space"):
            with contextlib.suppress(UserError):  # another package's space that is not installed here
                other = registry.component("space", name)
                if other.hand_made and not lacking(task.takes, other.makes):
                    found[name] = other.hand_made
        return cls(space.noun, found)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The baselines that are missed where they were not run, in the order of the sentence."""
        return (*self.baselines, RANDOM)

    def name(self, model: str) -> str:
        names = {SEARCHED: f"the searched {self.noun}", RANDOM: f"the random-search {self.noun}"}
        names |= {key: f"the {called}" for key, called in self.baselines.items()}
        return names.get(model, f"the model {model!r}")

    def order(self, models: Iterable[str]) -> list[str]:
        """Models in the order of the table: the known ones, then the others by alphabet."""
        return _first(models, (SEARCHED, RANDOM, *self.baselines))


Record = Mapping[str, Any]


def summarise(
    scores: Sequence[Record], objective: Objective, level: float = 0.05, wording: Wording | None = None
) -> dict[str, Any]:
    """Mean, interval and comparison of every model's test scores, and the sentence that says what they show.

    Args:
        scores: records with `model`, `genotype_id`, `split`, `value` and `n_parameters`, where known also
            `tokens_per_second` and `seconds`; only the split `test` counts. A value that is None or not finite
            is a run that diverged.
        level: of the tests; intervals cover 1 - level.
        wording: names of the models in the sentence.

    Returns:
        `sentence`, `test`, `level`, `models` (one row per model) and `comparisons` (searched against each baseline;
        `difference` is searched minus baseline, `reason` says why there is no p-value).
    """
    wording = wording or Wording()
    runs: dict[str, list[Record]] = {}
    for score in scores:
        if score["split"] == "test":
            runs.setdefault(score["model"], []).append(score)
    models = {name: _describe(name, runs[name], level) for name in wording.order(runs)}
    comparisons = [
        _compare(runs, models, name, objective, level)
        for name in _first(runs, wording.wanted)
        if name != SEARCHED and models[name]["n"] and models.get(SEARCHED, {"n": 0})["n"]
    ]
    return {
        "sentence": _sentence(models, comparisons, objective, level, wording),
        "test": TEST,
        "level": level,
        "models": list(models.values()),
        "comparisons": comparisons,
    }


def format_value(value: float | None, digits: int = 4) -> str:
    """A score with `digits` significant digits and no exponent: 112.3, 0.8123."""
    if value is None or not math.isfinite(value):
        return "-"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, digits - 1 - magnitude)}f}"


def _first(models: Iterable[str], first: Sequence[str]) -> list[str]:
    """`models` with those of `first` as they stand there, then the others by alphabet."""
    return sorted(models, key=lambda model: (first.index(model) if model in first else len(first), model))


def _values(runs: Sequence[Record]) -> list[float]:
    return [float(run["value"]) for run in runs if run["value"] is not None and math.isfinite(run["value"])]


def _describe(model: str, runs: Sequence[Record], level: float) -> dict[str, Any]:
    """One row of the table. The interval is Student's; it is None for a single value."""
    values = _values(runs)
    n = len(values)
    mean = statistics.fmean(values) if n else None
    low = high = None
    if mean is not None and n > 1:
        half = float(stats.t.ppf(1 - level / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
        low, high = mean - half, mean + half
    return {
        "model": model,
        "mean": mean,
        "low": low,
        "high": high,
        "n": n,
        "diverged": len(runs) - n,
        "n_parameters": next((run["n_parameters"] for run in runs if run.get("n_parameters") is not None), None),
        "tokens_per_second": _mean_of(runs, "tokens_per_second"),
        "seconds": _mean_of(runs, "seconds"),
    }


def _mean_of(runs: Sequence[Record], key: str) -> float | None:
    known = [run[key] for run in runs if run.get(key) is not None]
    return statistics.fmean(known) if known else None


def _compare(
    runs: Mapping[str, Sequence[Record]],
    models: Mapping[str, Record],
    against: str,
    objective: Objective,
    level: float,
) -> dict[str, Any]:
    searched, baseline = _values(runs[SEARCHED]), _values(runs[against])
    p_value = reason = None
    if _genotypes(runs[SEARCHED]) & _genotypes(runs[against]):
        reason = "same architecture"
    elif len(searched) == len(baseline) == 1:
        reason = "one seed each allows no test"
    elif min(len(searched), len(baseline)) == 1:
        reason = "a single seed on one side allows no test"
    elif min(searched) == max(searched) and min(baseline) == max(baseline):
        # Without spread the statistic is 0/0, or infinite: seeds that change nothing are no sample.
        reason = "the scores do not vary between seeds, which allows no test"
    else:
        # From the moments: SciPy's test on raw data warns about values that lie very close together.
        p_value = float(stats.ttest_ind_from_stats(*_moments(searched), *_moments(baseline), equal_var=False).pvalue)
    ours, theirs = models[SEARCHED]["mean"], models[against]["mean"]
    conclusion = "no evidence"
    if p_value is not None and p_value < level:
        conclusion = "better" if objective.better(ours, theirs) else "worse"
    return {
        "searched": SEARCHED,
        "against": against,
        "difference": ours - theirs,
        "p_value": p_value,
        "conclusion": conclusion,
        "reason": reason,
    }


def _genotypes(runs: Sequence[Record]) -> set[str]:
    return {run["genotype_id"] for run in runs if run.get("genotype_id")}


def _moments(values: Sequence[float]) -> tuple[float, float, int]:
    return statistics.fmean(values), statistics.stdev(values), len(values)


# -------------------------------------------------------------------------------------------------------- sentence


def _sentence(
    models: Mapping[str, Record],
    comparisons: Sequence[Record],
    objective: Objective,
    level: float,
    wording: Wording,
) -> str:
    """The verdict in words: clauses about the baselines, then what is missing, diverged or tested."""
    searched_name = wording.name(SEARCHED)
    if SEARCHED not in models:
        return f"No verdict yet: {searched_name} has no test score."
    searched = models[SEARCHED]
    if not searched["n"]:
        return f"No verdict: {_diverged(searched, wording)}."
    clauses: list[str] = []
    for comparison in comparisons:
        who, measure = ("it", "") if clauses else (searched_name, f"test {objective.name} ")
        numbers = " against ".join(_apart(searched["mean"], models[comparison["against"]]["mean"]))
        clauses.append(_clause(comparison, who, wording.name(comparison["against"]), measure + numbers))
    if not clauses:
        mean = format_value(searched["mean"])
        clauses.append(f"{searched_name} reached test {objective.name} {mean}; there is no baseline to compare with")
    sentences = ["; ".join(clauses)]
    sentences += [f"{wording.name(model)} was not run" for model in wording.wanted if model not in models]
    sentences += [_diverged(row, wording) for row in models.values() if row["diverged"]]
    if any(comparison["p_value"] is not None for comparison in comparisons):
        sentences.append(f"{TEST}, level {level:g}, {_seeds(models)}")
    return " ".join(text[0].upper() + text[1:] + "." for text in sentences)


def _apart(first: float | None, second: float | None) -> tuple[str, str]:
    """Both values with as many digits as it takes to tell them apart."""
    digits = 4
    while first != second and digits < 9 and format_value(first, digits) == format_value(second, digits):
        digits += 1
    return format_value(first, digits), format_value(second, digits)


def _clause(comparison: Record, who: str, other: str, numbers: str) -> str:
    p_value = comparison["p_value"]
    if comparison["reason"] == "same architecture":
        return f"{who} and {other} are the same architecture, so any difference is noise ({numbers})"
    if p_value is None:
        return f"no evidence that {who} beats {other} ({numbers}): {comparison['reason']}"
    numbers += ", p < 0.001" if p_value < 0.001 else f", p = {p_value:.3g}"
    if comparison["conclusion"] == "better":
        return f"{who} beats {other} ({numbers})"
    if comparison["conclusion"] == "worse":
        return f"{who} is worse than {other} ({numbers})"
    return f"no evidence that {who} beats {other} ({numbers})"


def _diverged(row: Record, wording: Wording) -> str:
    total = row["n"] + row["diverged"]
    if not row["n"]:
        return f"{'the only run' if total == 1 else f'all {total} runs'} of {wording.name(row['model'])} diverged"
    verb = "is" if row["diverged"] == 1 else "are"
    return f"{row['diverged']} of {total} runs of {wording.name(row['model'])} diverged and {verb} left out of the mean"


def _seeds(models: Mapping[str, Record]) -> str:
    counts = {name: row["n"] for name, row in models.items() if row["n"]}
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values()))} seeds each"
    return "n = " + ", ".join(f"{n} ({name})" for name, n in counts.items()) + " seeds"

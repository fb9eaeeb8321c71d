"""Start of every run: recipe -> opened -> checked -> forecast -> kernel.

Command line, Python and compression begin here. All that can be refused is refused before there is a run directory.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmnas.core import registry
from lmnas.core.capabilities import refuse_unfit
from lmnas.core.contracts import Workload
from lmnas.core.errors import UserError
from lmnas.core.genotype import Genotype, load_genotype
from lmnas.nn.kernel_table import PLAIN
from lmnas.nn.kernels import DEFAULT_CHUNK, decide, must_compile, unavailable
from lmnas.runs import forecast
from lmnas.runs.build import Opened, covering_space, open_recipe
from lmnas.runs.directory import Run
from lmnas.runs.kernel_choice import FILE, Pin, read_pin, write_pin
from lmnas.runs.recipe import Recipe


@dataclass(frozen=True)
class Start:
    """A recipe that was opened and checked, for a run directory that need not exist yet.

    Attributes:
        path: the run's directory.
        asked: the kernel asked for.
        given: the genotype to train instead of searching for one.
        work: the trainings that the run will do.
    """

    path: Path
    asked: str
    opened: Opened
    given: Genotype | None
    work: tuple[Workload, ...]

    @functools.cached_property
    def pin(self) -> Pin:
        """The kernel and the size of the loss' chunks that the run takes, or keeps.

        Raises:
            UserError: the kernel asked for is unavailable, or a training does not fit into memory.
        """
        before = read_pin(self.path)
        kernel, why = _kernel(self.opened, self.work, before, self.asked)
        needs = forecast.needs(self.opened, self.work, kernel)
        wanted = DEFAULT_CHUNK if before is None else before.chunk
        return Pin(kernel, why, forecast.fitting_chunk(self.opened, needs, wanted))

    def forecast(self) -> forecast.Forecast:
        """Jobs, seconds and memory of the whole run."""
        opened = self.opened
        seconds = forecast.seconds_of_work(opened, self.work)
        needs = forecast.needs(opened, self.work, self.pin.kernel)
        return forecast.Forecast(forecast.n_jobs(opened.recipe), seconds, forecast.peaks(needs, self.pin.chunk))


def start(recipe: Recipe, path: Path, asked: str | None = None) -> Start:
    """Open and check a recipe for a run at `path`, and choose its kernel; nothing is written.

    Args:
        asked: the kernel asked for; default: the recipe's.

    Raises:
        UserError: the data, the machine or a built model does not fit the recipe; the kernel asked for is
            unavailable; or a training does not fit into memory.
    """
    started = open_checked(recipe, path, asked)
    _ = started.pin
    return started


def open_checked(recipe: Recipe, path: Path, asked: str | None = None) -> Start:
    """Open a recipe and refuse settings that do not fit together; the kernel is left to `start`.

    Raises:
        UserError
    """
    opened = open_recipe(recipe)
    if opened.device.type == "meta":
        raise UserError("execution.device 'meta': tensors there hold no numbers; `auto` takes what there is")
    given = given_genotype(opened)
    for name, baseline in recipe.baselines.items():
        if baseline.source != "random":
            body = covering_space(load_genotype(baseline.source))
            refuse_unfit(f"baselines.{name}: task {opened.task.name!r}", opened.task.takes, body.name, body.makes)
    work = forecast.workloads(opened, given)
    for each in work:
        for split, batches in each.reads:
            try:
                opened.task.stream(split, batches, 0)
            except UserError as error:
                raise UserError(f"{each.where}.batches: {error}") from None
    return Start(path, recipe.execution.kernel if asked is None else asked, opened, given, work)


def given_genotype(opened: Opened) -> Genotype | None:
    """The genotype to train instead of searching, checked."""
    recipe, space = opened.recipe, opened.space
    if recipe.genotype is None:
        return None
    genotype = load_genotype(recipe.genotype)
    if genotype.space != space.name:
        raise UserError(
            f"genotype {recipe.genotype!r} is of space {genotype.space!r}; this recipe's space is {space.name!r}"
        )
    covering_space(genotype)
    return genotype


def kernels_of(recipe: Recipe) -> frozenset[str]:
    """Fast kernels that the code of the recipe's space or task can use."""
    return frozenset[str]().union(*(registry.component(kind, name).kernels for kind, name in _parts(recipe)))


def _parts(recipe: Recipe) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("space", recipe.space["name"]), ("task", recipe.task["name"])


def _kernel(opened: Opened, work: tuple[Workload, ...], before: Pin | None, asked: str) -> tuple[str, str]:
    """The kernel that a run keeps or takes, and why."""
    if before is not None and asked in ("auto", before.kernel):
        return before.kernel, before.why
    fast, neither = kernels_of(opened.recipe), " nor ".join(f"{kind} {name!r}" for kind, name in _parts(opened.recipe))
    if asked not in ("auto", PLAIN, *fast):
        raise UserError(f"kernel {asked!r}: neither {neither} has one; 'auto' takes the plain kernel")
    if not fast:
        return PLAIN, f"neither {neither} has another"
    if asked != "auto":
        problem = unavailable(asked)
        if problem:
            raise UserError(f"kernel {asked!r}: {problem}; 'auto' falls back to the reference")
        return asked, "asked for"
    if opened.device.type != "cpu":
        return PLAIN, f"device {opened.device.type}"
    return decide(lambda: forecast.seconds_of_work(opened, work))


def settle_kernel(started: Start, run: Run, say: Callable[[str], None], incident: Callable[[str], None]) -> None:
    """Take the kernel that a run keeps, compiled before any worker starts; or pin the one chosen now.

    Raises:
        UserError: it is unavailable.
    """
    before, asked, pin = read_pin(run.path), started.asked, started.pin
    fell_back = None
    try:
        if must_compile(pin.kernel):
            say(f"compiling the {pin.kernel} kernel, about 15 s, once")
        pin.apply()
    except UserError as problem:
        cause = problem.__cause__ or problem
        if before is not None and before.kernel == pin.kernel:
            raise UserError(
                f"run {run.path} began with the {pin.kernel} kernel, which cannot be had now ({cause}); "
                f"--kernel reference continues it with the plain kernel, whose sums differ in the last digits"
            ) from None
        if asked != "auto":
            raise
        fell_back = str(cause)
        pin = Pin(PLAIN, fell_back, pin.chunk)
        pin.apply()
    if before is not None and before.kernel != pin.kernel:
        incident(f"kernel: {before.kernel} until now, {pin.kernel} from here on; last digits may differ")
    opened = started.opened
    if before is None and asked == "auto" and opened.device.type == "cpu" and kernels_of(opened.recipe):
        fell_back = fell_back or unavailable("fused")
    if fell_back:
        incident(f"kernel: the plain one runs, which is slower: {fell_back}")
    if pin != before or not (run.path / FILE).is_file():
        write_pin(run.path, pin)

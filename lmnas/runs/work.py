"""Doing a job: what runs in a worker, for every kind of job (`lmnas.runs.job_kinds`).

A job is a pure function of the run's recipe and of a few plain arguments, its spec: `{"kind": "fit", arguments...}`.
"""

import contextlib
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock

from lmnas.core import registry
from lmnas.core.errors import Diverged, UserError
from lmnas.core.files import digest
from lmnas.core.job import Job, read_result, read_spec
from lmnas.core.updates import Report, Stop, never, silent
from lmnas.runs.build import Opened, open_recipe
from lmnas.runs.executors.base import Call
from lmnas.runs.kernel_choice import read_pin
from lmnas.runs.recipe import load_recipe

Spec = dict[str, Any]
NamedSpec = tuple[str, Spec]


@dataclass(frozen=True)
class JobKind(ABC):
    """One kind of job. Its fields are the arguments, plain data; it is registered as kind `job` under `kind`."""

    kind: ClassVar[str]

    @abstractmethod
    def do(self, place: "Workplace", job: Job) -> Mapping[str, Any]:
        """The work, resumable from the job's checkpoints; returns the result, plain data."""

    def spec(self) -> Spec:
        """Content of `job.json`: the kind and the arguments, optional ones only where given."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        optional = {field.name: field.default for field in fields(self) if field.default is not MISSING}
        return {"kind": self.kind, **{k: v for k, v in given.items() if k not in optional or v != optional[k]}}


def job_kind(spec: Spec) -> JobKind:
    """The job that a spec describes.

    Raises:
        UserError: of an unknown kind, or with other arguments than that kind has.
    """
    kind: type[JobKind] = registry.component("job", spec.get("kind"))
    try:
        return kind(**{key: value for key, value in spec.items() if key != "kind"})
    except TypeError as error:
        raise UserError(f"job of kind {kind.kind!r}: {error}") from None


class Workplace:
    """Does the jobs of one run, in one process. Recipe and data are opened once, when the first job needs them.

    Args:
        run: the run's directory.
        device: name of the device.
        opened: the run's recipe, where this process has opened it already.
    """

    def __init__(self, run: Path, device: str, opened: Opened | None = None):
        self.run = run
        self.device = device
        self._opened = opened

    @functools.cached_property
    def opened(self) -> Opened:
        return self._opened or open_recipe(load_recipe(str(self.run / "recipe.yaml")), self.device)

    def job(self, name: str) -> Path:
        return self.run / "jobs" / name

    def do(
        self,
        name: str,
        spec: Spec,
        report: Report = silent,
        stop: Stop = never,
    ) -> dict[str, Any]:
        """Do the job `name`, or continue it, or return what it gave before.

        Returns:
            The result with `status`: `ok`, `diverged` or `out-of-memory` (then with `failure`, one line).

        Raises:
            Interrupted: `stop` said so; the state is saved.
            UserError: the directory holds another job of this name.
        """
        directory = self.job(name)
        directory.mkdir(parents=True, exist_ok=True)
        # a worker whose driver was killed may live for another step: wait for it
        with FileLock(directory / "lock", preserve_lock_file=True):
            _refuse_another(directory, spec)
            done = read_result(directory)
            if done is not None:
                if (directory / "checkpoints").is_dir():  # a kill came between the result and this
                    Job(directory).checkpoints.delete()
                return done
            job = Job(directory, report, stop)
            job.write_spec(spec)
            # as the run began: the kernels' sums differ in order, and a continued run must not change its bits
            pin = read_pin(self.run)
            if pin is not None:
                pin.apply()
            result = _outcome(lambda: job_kind(spec).do(self, job), job)
            files = {path.name: digest(path.read_bytes()) for path in directory.glob("*.safetensors")}
            job.finish({**result, "files": files})
            with contextlib.suppress(OSError):
                job.checkpoints.delete()
            return {**result, "files": files}


_shared: dict[tuple[str, str], Workplace] = {}
"""The workplace of the last run of this process: one run's data serve all its jobs."""


def share(place: Workplace) -> None:
    """Let the jobs of a run that are done in this process use what has been opened; every start gives its own."""
    _shared.clear()
    _shared[str(place.run.resolve()), place.device] = place


def run_job(run: str, name: str, spec: Spec, device: str, report: Report, stop: Stop) -> dict[str, Any]:
    """Target of a job's `Call`: runs `Workplace.do`."""
    if (run, device) not in _shared:
        share(Workplace(Path(run), device))
    return _shared[run, device].do(name, spec, report, stop)


def job_call(run: Path, device: str, name: str, spec: Spec) -> Call:
    """The call that does a job of a run."""
    arguments = {"run": str(run.resolve()), "name": name, "spec": spec, "device": device}
    return Call(name, f"{__name__}:run_job", arguments)


def _refuse_another(directory: Path, spec: Spec) -> None:
    """A finished job is used again only where it is the one asked for."""
    stored, asked = read_spec(directory), json.loads(json.dumps(spec))
    if stored is None or stored == asked:
        return
    key = next(key for key in sorted({*stored, *asked}) if stored.get(key) != asked.get(key))
    there, here = (_short(document.get(key)) for document in (stored, asked))
    raise UserError(f"{directory}: its {key} is {there}, expected {here}; delete the folder to make this job anew")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _outcome(work: Callable[[], Mapping[str, Any]], job: Job) -> dict[str, Any]:
    """The result of a job's work with its status; failures of the candidate are results as well."""
    try:
        return {"status": "ok", **work()}
    except Diverged as failure:
        return {"status": "diverged", "failure": str(failure), "step": failure.step, "seconds": job.seconds}
    except (MemoryError, torch.OutOfMemoryError) as failure:
        return {"status": "out-of-memory", "failure": _first_line(failure), "seconds": job.seconds}
    except RuntimeError as failure:
        # the CPU allocator has no exception type of its own
        if "can't allocate memory" not in str(failure):
            raise
        return {"status": "out-of-memory", "failure": _first_line(failure), "seconds": job.seconds}


def intact(directory: Path, name: str) -> Path:
    """The file `name` that a finished job left in its directory, checked against the digest in its result.

    Raises:
        UserError: it is gone, cannot be read or was changed since.
    """
    path = directory / name
    expected = (read_result(directory) or {}).get("files", {}).get(name)
    try:
        found = digest(path.read_bytes())
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if found is None or found != expected:
        raise UserError(f"{path} is {'gone' if found is None else 'broken'}; delete {directory} to make it anew")
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
